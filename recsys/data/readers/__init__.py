"""One reader per file format. A format's config in the card is the reader: `format.read(paths, card) -> RawEvents`."""

from typing import Annotated

from pydantic import Field

from recsys.data.readers.abxi import AbxiFormat
from recsys.data.readers.ciao import CiaoFormat
from recsys.data.readers.table import TableFormat

Format = Annotated[AbxiFormat | CiaoFormat | TableFormat, Field(discriminator="name")]
