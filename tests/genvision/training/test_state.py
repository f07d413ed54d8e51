import json

import pytest
import torch

from genvision.errors import UserError
from genvision.training.state import CheckpointFolder, save_tensors


def write(folder, step):
    part = folder.begin(step)
    save_tensors(part / "model.safetensors", {"w": torch.full((3,), float(step))})
    torch.save({"step": step}, part / "stage.pt")
    folder.finish(part, {"step": step})


@pytest.fixture
def folder(tmp_path):
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=2)
    for step in (10, 20, 30):
        write(folder, step)
    return folder


def test_the_newest_are_kept(folder):
    assert folder.steps() == [20, 30]
    assert folder.read(30)["step"] == 30
    assert folder.load_tensors(30, "model.safetensors")["w"].tolist() == [30, 30, 30]
    assert folder.load_object(30, "stage.pt") == {"step": 30}


def test_a_half_written_checkpoint_is_none_and_is_swept_away(folder):
    part = folder.begin(40)
    (part / "model.safetensors").write_bytes(b"half")
    assert folder.steps() == [20, 30]
    write(folder, 50)
    assert folder.steps() == [30, 50] and not part.exists()


def test_writing_a_step_again_replaces_it(folder):
    write(folder, 30)
    assert folder.steps() == [20, 30] and folder.read(30)["step"] == 30


@pytest.mark.parametrize("name", ["model.safetensors", "stage.pt"])
@pytest.mark.parametrize("damage", ["truncate", "delete"])
def test_damage_is_one_line_that_names_the_file_and_the_mend(folder, name, damage):
    path = folder.path(30) / name
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    with pytest.raises(UserError) as error:
        folder.read(30)
    message = str(error.value)
    assert str(path) in message and f"delete {folder.path(30)}" in message and "\n" not in message


def test_overwritten_bytes_and_broken_facts_are_damage_too(folder):
    path = folder.path(30) / "stage.pt"
    path.write_bytes(b"x" * path.stat().st_size)
    folder.read(30)
    with pytest.raises(UserError, match="damaged"):
        folder.load_object(30, "stage.pt")
    facts = folder.path(20) / "state.json"
    facts.write_text(json.dumps({"step": 20})[:-3])
    with pytest.raises(UserError, match="damaged"):
        folder.read(20)
