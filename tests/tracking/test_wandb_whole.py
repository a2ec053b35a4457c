"""W&B from the first row to the model: real trainings, killed and gone on with."""

import pytest
import wandb

from distcv.data.readers import Arrays
from distcv.run_folder import RunFolder
from distcv.tracking import wandb_run
from support.runs import Runs, end
from support.wandb_runs import check_findings, check_whole, kill, sync
from support.wandb_server import WandbServer

FLAGS = [
    *("--model", "gap", "--max-steps", "80", "--log-every", "5", "--checkpoint-every", "20"),
    *("--track", "wandb"),
]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["online", "offline"])
def test_all_of_a_run_on_two_processes_that_was_killed_is_in_wandb_once(
    mode: str, runs: Runs, server: WandbServer, mnist: Arrays
) -> None:
    """A killed run of two ranks would have rows, tables or its model in W&B twice or not at all."""
    first, second = runs.group("r", 2, *FLAGS, WANDB_MODE=mode)
    runs.wait_for_step("r", 50, first)
    kill(first)
    end(second)
    said = runs.together("r", 2, *FLAGS, WANDB_MODE=mode)
    assert "resuming after step 40" in said
    if mode == "offline":
        assert server.requests == []
        sync(runs, "r")
    check_whole(runs, "r", server, starts=2)
    check_findings(runs, "r", server, mnist)
    assert runs.result("r")["processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["online", "offline"])
def test_best_and_last_checkpoint_are_two_versions_of_one_model(
    mode: str, runs: Runs, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Users who fetch `best` or `latest` from W&B would get the wrong weights."""
    folder = RunFolder(runs.folder / "a run")
    checkpoints = [folder.checkpoints / f"step-{step:08d}" for step in (1, 2)]
    for path in checkpoints:
        path.mkdir(parents=True)
        (path / "model.safetensors").write_text(path.name)
    (folder.path / "config.yaml").write_text("model: gap\n")
    monkeypatch.setenv("WANDB_DATA_DIR", str(folder.path))
    wandb.teardown()  # it keeps the environment of its first use
    run = wandb.init(id="r", dir=str(folder.path), mode=mode)
    wandb_run.log_models(run, folder, checkpoints[1], checkpoints[0], {"seed": 0})
    run.finish()
    wandb.teardown()
    if mode == "offline":
        sync(runs, "a run")
    assert [(a.name, a.version, a.aliases) for a in server.artifacts] == [
        ("model-a_run", 0, ["best"]),
        ("model-a_run", 1, ["latest"]),
    ]
    assert [a.files["model.safetensors"].decode() for a in server.artifacts] == [
        path.name for path in checkpoints
    ]
