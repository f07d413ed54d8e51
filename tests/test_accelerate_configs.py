"""The files in configs/accelerate: accelerate launch reads them, and what arrives in the processes that it starts is what they say."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from torch.distributed.fsdp import CPUOffloadPolicy

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "accelerate"
FILES = sorted(path.name for path in FOLDER.iterdir())
SHARDED = [name for name in FILES if "fsdp2" in name]


def launched(name: str, *words: str):
    """Arguments of accelerate launch with this file, all filled in."""
    parser = launch_command_parser()
    return _validate_launch_command(parser.parse_args(["--config_file", str(FOLDER / name), *words, "train.py"]))[0]


def environment(name: str, *words: str) -> dict[str, str]:
    """What accelerate launch sets for the processes that it starts with this file."""
    args = launched(name, *words)
    if args.multi_gpu or args.use_fsdp:
        return prepare_multi_gpu_env(args)
    return prepare_simple_launcher_cmd_env(args)[1]


def test_there_is_a_file_for_each_kind_of_machine():
    machines = {name: (launched(name).num_machines, launched(name).num_processes) for name in FILES}
    assert machines == {
        "cpu.yaml": (1, 1),
        "cpu_fsdp2.yaml": (1, 2),
        "one_gpu.yaml": (1, 1),
        "eight_gpus.yaml": (1, 8),
        "eight_gpus_fsdp2.yaml": (1, 8),
        "two_nodes_fsdp2.yaml": (2, 16),
    }


@pytest.mark.parametrize("name", FILES)
def test_the_processes_are_told_how_to_work_together(name):
    environ = environment(name, "--machine_rank", "1", "--main_process_ip", "node0")
    assert environ.get("ACCELERATE_USE_FSDP", "false") == ("true" if name in SHARDED else "false")
    assert environ["ACCELERATE_MIXED_PRECISION"] == "no" and environ["ACCELERATE_DYNAMO_BACKEND"] == "NO"
    if name in ("cpu.yaml", "one_gpu.yaml"):
        assert environ["ACCELERATE_USE_CPU"] == str(name == "cpu.yaml")


@pytest.mark.parametrize("name", SHARDED)
def test_the_plugin_says_what_the_file_says(name, monkeypatch):
    stated = yaml.safe_load((FOLDER / name).read_text())["fsdp_config"]
    for offload in ("false", "true"):
        words = ("--machine_rank", "1", "--main_process_ip", "node0", "--fsdp_offload_params", offload)
        for key, value in environment(name, *words).items():
            if key.startswith("FSDP_"):
                monkeypatch.setenv(key, value)
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == stated["fsdp_version"] == 2
        assert plugin.reshard_after_forward is stated["fsdp_reshard_after_forward"]
        assert plugin.state_dict_type.name == stated["fsdp_state_dict_type"]
        assert isinstance(plugin.cpu_offload, CPUOffloadPolicy) == (offload == "true")
        assert plugin.activation_checkpointing is stated["fsdp_activation_checkpointing"] is False
        assert plugin.cpu_ram_efficient_loading is stated["fsdp_cpu_ram_efficient_loading"] is False


def test_two_machines_meet_at_the_first_one():
    args = launched("two_nodes_fsdp2.yaml", "--machine_rank", "1", "--main_process_ip", "node0")
    prepare_multi_gpu_env(args)
    assert (args.nnodes, args.nproc_per_node, args.node_rank, args.rdzv_endpoint) == ("2", "8", 1, "node0:29500")
