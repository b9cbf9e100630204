"""Which packages a verb does not import: start-up time is mostly imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from study import make_study

from pipeline.params import dump_settings
from stages.vision import compiler_left_out

STAGE_TWO = {"sklearn", "scipy", "matplotlib", "dask", "distributed", "pandas", "dvc", "dvclive"}
COMPILER = {"torch._dynamo", "sympy"}
PROBE = """\
import json, sys
from pipeline.cli import main
try:
    main(sys.argv[2:])
except SystemExit as stopped:
    print(json.dumps([stopped.code, sorted(sys.modules)]), file=open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with a trained model."""
    study = make_study(tmp_path_factory.mktemp("startup") / "study", per_class=4, train={"epochs": 1})
    (study.root / "params.yaml").write_text(dump_settings(study.settings))
    for verb in ("extract", "train"):
        subprocess.run([sys.executable, "-m", "pipeline", verb], cwd=study.root, check=True, capture_output=True)
    return study.root


def modules(folder: Path, *words: str, code: int = 0) -> set[str]:
    # Of a verb that ended without writing it, the list of the verb before would be read.
    (folder / "modules.json").unlink(missing_ok=True)
    # A command in the process of the tests leaves its plugins there for the processes that it starts.
    environment = {name: value for name, value in os.environ.items() if name != "FPT_PLUGINS"}
    command = [sys.executable, "-c", PROBE, "modules.json", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert (folder / "modules.json").exists(), (done.returncode, done.stderr)
    found, names = json.loads((folder / "modules.json").read_text())
    assert found == code, done.stderr
    return set(names)


@pytest.mark.parametrize(
    ("words", "absent"),
    [
        (["--help"], STAGE_TWO | COMPILER | {"torch", "timm", "torchvision", "zarr", "pyarrow", "PIL", "numpy"}),
        (["--version"], STAGE_TWO | COMPILER | {"torch", "timm", "torchvision", "zarr", "pyarrow", "PIL", "numpy"}),
        (["cache", "path"], STAGE_TWO | COMPILER | {"torch", "timm", "torchvision", "zarr", "pyarrow", "PIL"}),
        (["prepare"], STAGE_TWO | COMPILER),
        (["extract"], STAGE_TWO | COMPILER),
        (["doctor"], STAGE_TWO | COMPILER),
        (["evaluate"], COMPILER | {"timm", "torchmetrics", "transformers"}),
        (["predict", "images/grid/0-000.png"], STAGE_TWO | COMPILER | {"zarr", "pyarrow", "fsspec"}),
        (["train", "--method", "linear"], COMPILER | {"timm", "torchvision", "torchmetrics", "transformers"}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_verb_imports_only_what_it_needs(folder: Path, words: list[str], absent: set[str]) -> None:
    imported = absent & modules(folder, *words)
    assert not imported


@pytest.mark.parametrize(
    "words",
    [
        "prepare", "extract", "extract --plan", "train", "evaluate", "evaluate --adapt foa", "evaluate --images images",
        "compare nothing", "predict images", "predict --unlabelled", "sweep lr=1e-3", "lr-find", "bench",
        "bench --shift", "federate", "federate --traffic", "data check", "data repair", "demo data", "demo summary",
    ],
)  # fmt: skip
def test_without_a_study_or_a_model_a_verb_fails_before_torch_is_imported(tmp_path: Path, words: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").touch()
    assert "torch" not in modules(tmp_path, *words.split(), code=2)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_compiler_works_when_it_is_needed() -> None:
    code = (
        "import sys, torch\n"
        "from stages.vision import compiler_left_out\n"
        "plain = torch.compiler.disable\n"
        "with compiler_left_out():\n    import torchvision, timm\n"
        "assert 'torch._dynamo' not in sys.modules and 'torch._dynamo.utils' not in sys.modules\n"
        "assert torch.compiler.disable is plain\n"
        "from torchvision.ops import roi_align\n"
        "boxes = torch.tensor([[0.0, 0.0, 0.0, 4.0, 4.0]])\n"
        "assert roi_align(torch.ones(1, 1, 8, 8), boxes, 2).shape == (1, 1, 2, 2)\n"
        "f = torch.compile(lambda x: x * 2, backend='eager')\n"
        "assert f(torch.ones(2)).sum() == 4\n"
        "import torch._dynamo.utils as utils\n"
        "print(utils.__file__ is not None and utils.is_compile_supported('cpu') is not None)\n"
    )
    assert run(code) == "True"


def test_other_needs_of_the_compiler_are_met_during_the_import() -> None:
    code = (
        "import sys, torch\n"
        "from stages.vision import compiler_left_out\n"
        "with compiler_left_out():\n"
        "    from torch._dynamo.utils import counters\n"
        "    f = torch.compiler.disable(lambda x: x + 1)\n"
        "    assert f(torch.ones(1)) == 2\n"
        "print(type(sys.modules['torch._dynamo.utils']).__name__)\n"
    )
    assert run(code) == "module"


def test_with_the_compiler_there_nothing_is_replaced() -> None:
    import torch._dynamo

    before = torch.compiler.disable
    with compiler_left_out():
        assert torch.compiler.disable is before
        assert sys.modules["torch._dynamo.utils"].__file__


def test_a_model_without_memory_is_built_like_a_real_one() -> None:
    from stages.lpm.catalogue import find_model

    found = find_model("test_vit.r160_in1k")
    meta, real = found.build_on_meta(), found.build(pretrained=False)
    assert {name: value.shape for name, value in meta.state_dict().items()} == {
        name: value.shape for name, value in real.state_dict().items()
    }
    assert all(value.is_meta for value in meta.state_dict().values())
