"""Fine-grained prompt tuning: run a large vision transformer once per image, then train on its cached features.

    import fpt

    study = fpt.init("my-study", images="images")      # or fpt.open_study("my-study")
    fpt.prepare(study)
    fpt.extract(study)
    fpt.train(study)
    print(fpt.evaluate(study).auc)
    print(fpt.load("my-study/outputs/model").predict("new-images"))

Each function is the `fpt` command of the same name. torch is imported by the first function that computes.
"""

from typing import TYPE_CHECKING, Any

from schemas.version import __version__

if TYPE_CHECKING:
    from pipeline.api import evaluate, extract, init, open_study, predict, prepare, train
    from pipeline.loaded_model import Model, Predictions, load
    from pipeline.project import Study
    from schemas.errors import FptError
    from schemas.features import ExtractionReceipt
    from schemas.manifest import PrepareResult
    from schemas.results import Metrics, Prediction, TrainResult

__all__ = [
    "ExtractionReceipt",
    "FptError",
    "Metrics",
    "Model",
    "Prediction",
    "Predictions",
    "PrepareResult",
    "Study",
    "TrainResult",
    "__version__",
    "evaluate",
    "extract",
    "init",
    "load",
    "open_study",
    "predict",
    "prepare",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import the implementation at the first use of a name: `import fpt` itself takes milliseconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipeline import api

    value = getattr(api, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
