"""Several models and versions side by side: found, loaded, rolled back, taken away."""

import io
import json
import shutil
import signal
import time

import cv2
import numpy as np
import pytest
from conftest import HEIGHT, ROOT, WIDTH
from test_serve import Running, write_keys

from dataset.phantoms import draw_phantom
from serving.config import Config
from serving.errors import Problem
from serving.monitoring import Metrics
from serving.repository import Repository, read_aliases
from utils import UserError

LUNGS = ROOT / "files" / "lungs"
FILES = ("unet.onnx", "unet-int8.onnx", "manifest.json")


def add(root, *titles: str) -> None:
    """Put the pretrained model into a repository under these names and versions."""
    for title in titles:
        place = root / title
        place.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            shutil.copy(LUNGS / name, place / name)


def make_repository(root) -> Repository:
    config = Config(model=str(root), threads=1, engine="onnxruntime", precision="float32")
    return Repository(config, Metrics())


def titles(repository: Repository) -> list[str]:
    return sorted(one.title for one in repository.served.values())


def write_aliases(root, **aliases: str) -> None:
    (root / "aliases.json").write_text(json.dumps(aliases))


def test_one_file_is_one_model():
    repository = make_repository(LUNGS / "unet.onnx")
    assert titles(repository) == ["unet/1"] and repository.find().title == "unet/1"
    assert repository.find("unet", "1") is repository.find()
    for names in (("lungs", ""), ("unet", "2")):
        with pytest.raises(Problem, match=f"no model {names[0]}.* is served"):
            repository.find(*names)


def test_the_highest_version_answers_or_what_an_alias_names(tmp_path):
    add(tmp_path, "lungs/1", "lungs/2", "lungs/10", "heart/1")
    write_aliases(tmp_path, default="lungs", stable="lungs/2")
    repository = make_repository(tmp_path)
    assert titles(repository) == ["heart/1", "lungs/1", "lungs/10", "lungs/2"]
    assert repository.find().title == repository.find("lungs").title == "lungs/10"
    assert repository.find("stable").title == "lungs/2"
    assert repository.find("lungs", "1").title == "lungs/1"
    assert repository.find("default", "1").title == "lungs/1"
    assert repository.find("stable", "2").title == "lungs/2"
    with pytest.raises(Problem, match="no model stable of version 1 is served"):
        repository.find("stable", "1")
    # Rolled back by an alias of the model's own name.
    write_aliases(tmp_path, default="lungs", lungs="lungs/2")
    repository.reload()
    assert repository.find().title == repository.find("lungs").title == "lungs/2"
    assert [one.version for one in repository.versions("lungs")] == ["10", "2", "1"]


def test_without_a_default_the_only_model_answers(tmp_path):
    add(tmp_path, "lungs/1")
    assert make_repository(tmp_path).find().title == "lungs/1"
    add(tmp_path, "heart/1")
    with pytest.raises(UserError, match='aliases.json names no "default" among heart, lungs'):
        make_repository(tmp_path)


def test_what_is_new_is_loaded_and_what_is_gone_is_dropped(tmp_path):
    add(tmp_path, "lungs/1")
    repository = make_repository(tmp_path)
    first = repository.find()
    add(tmp_path, "lungs/2")
    repository.reload()
    assert repository.find().title == "lungs/2"
    assert repository.find("lungs", "1") is first  # not loaded again
    shutil.rmtree(tmp_path / "lungs" / "2")
    repository.reload()
    assert titles(repository) == ["lungs/1"]


def test_a_bad_version_is_told_and_the_others_stay(tmp_path, capsys):
    add(tmp_path, "lungs/1")
    repository = make_repository(tmp_path)
    add(tmp_path, "lungs/2")
    with (tmp_path / "lungs" / "2" / "unet.onnx").open("ab") as file:
        file.write(b"changed")
    repository.reload()
    assert repository.find().title == "lungs/1"
    assert '"a model cannot be loaded"' in capsys.readouterr().out
    (bad,) = [row for row in repository.index() if row["version"] == "2"]
    assert bad["state"] == "UNAVAILABLE" and "manifest" in bad["reason"]
    # A half-copied file in the place of one that is served: that one stays.
    (tmp_path / "lungs" / "1" / "unet.onnx").write_bytes(b"half")
    repository.reload()
    assert titles(repository) == ["lungs/1"]


def test_nothing_changes_if_nothing_would_answer(tmp_path):
    add(tmp_path, "lungs/1")
    repository = make_repository(tmp_path)
    write_aliases(tmp_path, default="heart")
    with pytest.raises(UserError, match="no model heart is served"):
        repository.reload()
    assert repository.find().title == "lungs/1"
    with pytest.raises(Problem, match="no model heart is served"):
        repository.load("lungs")


def test_models_are_unloaded_and_loaded(tmp_path):
    add(tmp_path, "lungs/1", "heart/1")
    write_aliases(tmp_path, default="lungs")
    repository = make_repository(tmp_path)
    repository.unload("heart")
    repository.reload()
    assert titles(repository) == ["lungs/1"]
    with pytest.raises(Problem, match="lungs answers by default"):
        repository.unload("lungs")
    with pytest.raises(Problem, match="no model heart is served"):
        repository.unload("heart")
    repository.load("heart")
    assert titles(repository) == ["heart/1", "lungs/1"]
    with pytest.raises(Problem, match="the repository has no model liver"):
        repository.load("liver")


def test_a_bad_version_of_a_model_that_is_loaded_again_costs_that_version_only(tmp_path):
    add(tmp_path, "lungs/1", "heart/1", "heart/2")
    write_aliases(tmp_path, default="lungs")
    repository = make_repository(tmp_path)
    repository.unload("heart")
    (tmp_path / "heart" / "2" / "unet.onnx").write_bytes(b"half")
    with pytest.raises(Problem, match="manifest"):
        repository.load("heart")
    repository.reload()
    assert titles(repository) == ["heart/1", "lungs/1"]


def test_an_error_of_the_engine_costs_one_model_only(tmp_path, monkeypatch):
    add(tmp_path, "lungs/1")
    repository = make_repository(tmp_path)
    add(tmp_path, "lungs/2")

    def fail(*args):
        raise RuntimeError("no such operator")

    monkeypatch.setattr("serving.repository.load_exported", fail)
    repository.reload()
    assert titles(repository) == ["lungs/1"]
    assert "no such operator" in repository.index()[1]["reason"]


def test_a_start_without_any_model_that_works_says_why(tmp_path):
    add(tmp_path, "lungs/1", "lungs/2")
    for version in "12":
        (tmp_path / "lungs" / version / "unet.onnx").write_bytes(b"half")
    with pytest.raises(UserError, match="no model can be loaded: .*manifest"):
        make_repository(tmp_path)


@pytest.mark.parametrize(
    "text", ["[]", '{"a": 1}', '{"a": "b/c"}', '{"../a": "b"}', '{"a": "../b"}', "{"]
)
def test_aliases_that_are_none(tmp_path, text):
    (tmp_path / "aliases.json").write_text(text)
    with pytest.raises(UserError, match="cannot be read|holds other things than aliases"):
        read_aliases(tmp_path / "aliases.json")


def test_a_folder_without_models(tmp_path):
    (tmp_path / "notes" / "v1").mkdir(parents=True)
    with pytest.raises(UserError, match="has no model; expected .*/NAME/1/unet.onnx"):
        make_repository(tmp_path)


@pytest.fixture
def png() -> bytes:
    picture, _ = draw_phantom(np.random.default_rng(0))
    return cv2.imencode(".png", picture)[1].tobytes()


def test_a_service_of_several_models(tmp_path, png):
    """Over HTTP: routes by name and version, load, roll back, unload, rights, log."""
    root = tmp_path / "models"
    add(root, "lungs/1", "other/1")
    write_aliases(root, default="lungs")
    keys = write_keys(tmp_path / "keys", plain="viewer", boss="operator segment,admin")
    service = Running(
        root, tmp_path, "--model", str(root), "--keys", keys, headers={"X-API-Key": "plain"}
    )
    boss = {"X-API-Key": "boss"}
    try:
        ask = service.client
        assert ask.get("/v1/model").json()["name"] == "lungs"
        shown = ask.get("/v1/models").json()
        assert shown["default"] == "lungs/1" and shown["aliases"] == {"default": "lungs"}
        expected = ask.post("/v1/segment", content=png).content
        for path in ("/v1/models/other:segment", "/v1/models/lungs/versions/1:segment"):
            assert ask.post(path, content=png).content == expected
        for path in ("/v1/models/none:segment", "/v1/models/lungs/versions/9:segment"):
            answer = ask.post(path, content=png)
            assert answer.status_code == 404 and "is served" in answer.json()["detail"]
        add(root, "lungs/2")
        load = "/v2/repository/models/lungs/load"
        assert ask.post(load).status_code == 403
        assert ask.post(load, headers=boss).status_code == 200
        assert ask.get("/v1/model").json()["version"] == "2"
        assert ask.get("/v2/models/lungs").json()["versions"] == ["2", "1"]
        assert len(ask.get("/v1/models/lungs").json()["model_version_status"]) == 2
        assert len(ask.get("/v2/models/lungs/stats").json()["model_stats"]) == 2
        # Back to version 1, by the alias and SIGHUP; nobody is refused meanwhile.
        write_aliases(root, default="lungs", lungs="lungs/1")
        service.process.send_signal(signal.SIGHUP)
        end = time.monotonic() + 30
        while ask.get("/v1/model").json()["version"] != "1":
            assert ask.post("/v1/segment", content=png).status_code == 200
            assert time.monotonic() < end
        unload = "/v2/repository/models/other/unload"
        assert ask.post(unload, headers=boss).status_code == 200
        assert ask.get("/v2/models/other/ready").status_code == 404
        assert ask.get("/v2/models/lungs/ready").json() == {"ready": True}
        names = {row["name"] for row in ask.post("/v2/repository/index").json()}
        assert names == {"lungs"}
    finally:
        service.stop()
    lines = [json.loads(line) for line in service.log.read_text().splitlines() if line[:1] == "{"]
    models = {line.get("model", "") for line in lines}
    assert any(model.startswith("lungs/2 ") for model in models)
    assert any(model.startswith("other/1 ") for model in models)


def test_tensors_name_the_model_that_computed_them(tmp_path):
    root = tmp_path / "models"
    add(root, "lungs/3")
    service = Running(root, tmp_path, "--model", str(root))
    try:
        ask = service.client
        tensor = {"name": "images", "datatype": "FP32", "shape": [1, HEIGHT, WIDTH, 1]}
        described = ask.get("/v2/models/lungs").json()
        tensor["name"] = described["inputs"][0]["name"]
        body = {"inputs": [tensor | {"data": np.zeros(HEIGHT * WIDTH).tolist()}]}
        answer = ask.post("/v2/models/lungs/versions/3/infer", json=body).json()
        assert (answer["model_name"], answer["model_version"]) == ("lungs", "3")
        spec = ask.get("/v1/models/lungs/metadata").json()["model_spec"]
        assert (spec["name"], spec["version"]) == ("lungs", "3")
    finally:
        service.stop()
    assert io.StringIO(service.log.read_text()).readline().count("lungs/3") == 1
