"""Dataset cards: one YAML file says where a dataset comes from, how its files are read and what must come out."""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from recsys.data.policies import PrepareOptions
from recsys.data.readers import Format
from recsys.data.schema import MAX_DOMAINS, DataError
from recsys.loading import Config, load_yaml

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
DomainName = Annotated[str, Field(pattern=r"^[^/@\[\]]+$")]
"""A domain's name becomes part of metric keys, `test/food/ndcg@10`, so it has none of their signs."""
FileName = Annotated[str, Field(pattern=r"^[^/\\]+$")]
Number = Annotated[int, Field(ge=0)]


class RawFile(Config):
    """What is known of one raw file."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    bytes: Number | None = None
    url: str | None = None
    """Where it can be fetched from without asking anybody."""
    optional: bool = False
    alternative_to: str | None = None
    """Another file of the card that this one can stand for."""
    domain: str | None = None
    """The domain of all events in the file."""


class Counts(Config):
    """Published numbers, over all domains or by domain. Whatever is given is checked."""

    users: Number | None = None
    items: Number | dict[str, Number] | None = None
    events: Number | dict[str, Number] | None = None
    validation: Number | dict[str, Number] | None = None
    """Targets under leave_one_out."""
    test: Number | dict[str, Number] | None = None

    def by_domain(self) -> Iterator[str]:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, dict):
                yield from value


class Published(Config):
    source: Counts | None = None
    """Users, items and events in the raw files, before anything is done to them."""
    prepared: Counts | None = None
    """After the card's own preparation."""


class DatasetCard(Config):
    """Everything the project knows about a dataset."""

    name: Name
    title: str
    source: str
    """URL or citation: where a person gets the files."""
    licence: str
    folder: str | None = None
    """Name under which the raw folder is looked for beside the card's own name."""
    format: Format
    files: dict[FileName, RawFile]
    domains: Annotated[tuple[DomainName, ...], Field(min_length=1, max_length=MAX_DOMAINS)]
    prepare: PrepareOptions = PrepareOptions()
    published: Published = Published()

    @model_validator(mode="after")
    def _consistent(self) -> "DatasetCard":
        if len(set(self.domains)) < len(self.domains) or {"macro", "micro"} & set(self.domains):
            raise ValueError("domains must be distinct, and not called macro or micro (metric keys use these)")
        if not self.files:
            raise ValueError("files is empty; name the raw files")
        for name in self.format.file_names():
            if name not in self.files:
                raise ValueError(f"format names the file {name}, which is not under files ({', '.join(self.files)})")
        for name, file in self.files.items():
            if file.alternative_to is not None and file.alternative_to not in self.files:
                raise ValueError(f"files.{name}.alternative_to: there is no file {file.alternative_to}")
            if file.domain is not None and file.domain not in self.domains:
                raise ValueError(f"files.{name}.domain: {file.domain!r} is not under domains")
        file_domains = {name: file.domain for name, file in self.files.items()}
        if problem := self.format.check(self.domains, file_domains):
            raise ValueError(problem)
        kept = self.prepare.domains or self.domains
        counted = [*(self.published.source or Counts()).by_domain(), *(self.published.prepared or Counts()).by_domain()]
        for domain in {*kept, *counted}:
            if domain not in self.domains:
                raise ValueError(f"{domain!r} (under prepare or published) is not under domains")
        return self


def shipped_cards() -> Path:
    """The cards that come with the package: inside an installed one, or in the repository."""
    package = Path(__file__).parents[1]
    installed = package / "_cards"
    return installed if installed.is_dir() else package.parent / "data" / "cards"


def card_paths(data_root: Path) -> dict[str, Path]:
    """Dataset name -> card, those of the data root before those of the package."""
    paths: dict[str, Path] = {}
    for folder in (data_root / "cards", shipped_cards()):
        for path in sorted(folder.glob("*.yaml")):
            paths.setdefault(path.stem, path)
    return dict(sorted(paths.items()))


def load_card(name: str, data_root: Path) -> DatasetCard:
    """The card `<name>.yaml`. Raises DataError if there is none, ConfigError if it is not a valid card."""
    paths = card_paths(data_root)
    if name not in paths:
        near = difflib.get_close_matches(name, paths, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"known datasets: {', '.join(paths) or 'none'}"
        raise DataError(
            f"there is no dataset {name!r}; {hint} A new one needs a card, {data_root / 'cards'}/{name}.yaml."
        )
    card = load_yaml(paths[name], DatasetCard)
    if card.name != name:
        raise DataError(f"{paths[name]}: the card calls itself {card.name!r}; name and file name must agree")
    return card
