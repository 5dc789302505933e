from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, field_validator

from recsys.loading import Config, ConfigError, dump_yaml, load_yaml, parse_config


class Cross(Config):
    gate: Literal["sigmoid", "tanh"] = "sigmoid"
    num_units: int = 1


class Sasrec(Config):
    name: Literal["sasrec"] = "sasrec"
    d_model: int = 64


class CrossDomain(Config):
    name: Literal["cross_domain"] = "cross_domain"
    d_model: int = 64
    cross: Cross | None = None


class Optim(Config):
    lr: float = 1e-3

    @field_validator("lr")
    @classmethod
    def _positive(cls, lr: float) -> float:
        if lr <= 0:
            raise ValueError("must be above 0")
        return lr


class Study(Config):
    seed: int = 0
    model: Annotated[Sasrec | CrossDomain, Field(discriminator="name")]
    optim: Optim = Optim()
    ks: tuple[int, ...] = (5, 10)


@pytest.fixture
def study(tmp_path: Path):
    def read(text: str, *overrides: str) -> Study:
        path = tmp_path / "study.yaml"
        path.write_text(text)
        return load_yaml(path, Study, overrides)

    return read


def test_reads_nested_values_with_yaml_that_means_what_it_says(study) -> None:
    config = study("model: {name: cross_domain, cross: {num_units: 2}}\noptim: {lr: 1e-4}\nks: [1, 20]")
    assert config.model.cross.num_units == 2
    assert config.optim.lr == 1e-4
    assert config.ks == (1, 20)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {name: sasrec}\nsede: 1", "sede: unknown key; did you mean seed?"),
        ("model: {name: sasrec, d_modle: 1}", "model.d_modle: unknown key; did you mean model.d_model?"),
        (
            "model: {name: cross_domain, cross: {gait: tanh}}",
            "model.cross.gait: unknown key; did you mean model.cross.gate?",
        ),
        ("model: {name: sasrec, zzz: 1}", "model.zzz: unknown key; valid keys: d_model, name"),
        ("model: {name: sasrek}", "model.name: there is no 'sasrek'; did you mean sasrec?"),
        ("model: {d_model: 3}", "model: this part needs a key 'name' (one of cross_domain, sasrec)"),
        ("seed: 1", "model: this key is missing"),
        ("model: {name: sasrec, d_model: '64'}", 'model.d_model: input should be a valid integer (given: "64")'),
        ("model: {name: sasrec}\noptim: {lr: -1}", "optim.lr: must be above 0"),
        ("model: {name: sasrec}\nseed: 1\nseed: 2", "line 3: the key 'seed' stands twice"),
        ("model: [", "is not valid YAML"),
        ("- 1", "must hold a mapping"),
        ("", "must hold a mapping of keys to values, not empty"),
    ],
)
def test_one_clear_error(study, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        study(text)
    assert message in str(error.value)


def test_all_problems_are_named_at_once(study) -> None:
    with pytest.raises(ConfigError) as error:
        study("model: {name: sasrec, d_modle: 1}\nsede: 3")
    assert "model.d_modle" in str(error.value)
    assert "sede" in str(error.value)


def test_overrides(study) -> None:
    text = "model: {name: cross_domain, cross: null}"
    config = study(text, "model.d_model=128", "model.cross.gate=tanh", "optim.lr=5e-4", "ks=[1]")
    assert (config.model.d_model, config.model.cross.gate, config.optim.lr, config.ks) == (128, "tanh", 5e-4, (1,))
    with pytest.raises(ConfigError, match=r"did you mean model\.d_model"):
        study(text, "model.d_modell=128")
    with pytest.raises(ConfigError, match=r"must look like key\.path=value"):
        study(text, "model.d_model")
    with pytest.raises(ConfigError, match="it has no key"):
        study(text, "model.name.x=1")


def test_missing_file_suggests_a_neighbour(tmp_path: Path) -> None:
    (tmp_path / "synthetic.yaml").touch()
    with pytest.raises(ConfigError, match=r"did you mean .*synthetic\.yaml"):
        load_yaml(tmp_path / "sintetic.yaml", Study)


def test_dump_is_the_resolved_config_and_reads_back(tmp_path: Path) -> None:
    config = parse_config({"model": {"name": "cross_domain", "cross": {}}}, Study, "here")
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_yaml(config))
    assert "gate: sigmoid" in path.read_text()
    assert load_yaml(path, Study) == config
