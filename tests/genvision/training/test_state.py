import pytest
import torch

from genvision.errors import UserError
from genvision.training.saved_tensors import SavedTensors
from genvision.training.state import CheckpointFolder, DamagedCheckpoint, describe, save_tensors


def write(folder, step):
    part = folder.begin(step)
    save_tensors(part / "model.safetensors", {"w": torch.full((3,), float(step))})
    torch.save({"step": step}, part / "stage.pt")
    folder.finish(step, {"skipped_steps": 0}, {path.name: describe(path) for path in part.iterdir()})


@pytest.fixture
def folder(tmp_path):
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=2)
    for step in (10, 20, 30):
        write(folder, step)
    return folder


def test_the_newest_are_kept(folder):
    assert folder.steps() == [20, 30]
    assert folder.read(30)["step"] == 30
    assert SavedTensors(folder.path(30), "model").rows("w", 0, 3).tolist() == [30, 30, 30]
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


@pytest.mark.parametrize("name", ["model.safetensors", "stage.pt", "state.json"])
@pytest.mark.parametrize("damage", ["truncate", "delete", "overwrite"])
def test_damage_is_one_line_that_names_the_file_and_the_one_before_is_taken(folder, name, damage, capsys):
    path = folder.path(30) / name
    data = path.read_bytes()
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes(data[:-3] if damage == "truncate" else b"x" * len(data))
    with pytest.raises(DamagedCheckpoint) as error:
        folder.read(30)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    found = folder.newest()
    assert found.step == 20 and "set aside as step_00000030.damaged" in capsys.readouterr().err
    assert folder.steps() == [20]
    write(folder, 30)  # the run comes there again
    assert folder.newest().step == 30


def test_the_newest_up_to_a_step_can_be_asked_for(folder):
    assert folder.newest(at_most=29).step == 20
    assert folder.newest(at_most=19) is None
    assert folder.steps() == [20, 30]


def test_a_checkpoint_of_another_format_is_no_damage(folder):
    facts = folder.path(30) / "state.json"
    facts.write_text(facts.read_text().replace('"format": 3', '"format": 1'))
    with pytest.raises(UserError, match="is a checkpoint in format 1, this genvision writes and reads 3"):
        folder.newest()
    assert folder.steps() == [20, 30]
