"""Shape annotations of the package are checked while it is tested."""

from jaxtyping import install_import_hook

install_import_hook("recsys", "beartype.beartype")
