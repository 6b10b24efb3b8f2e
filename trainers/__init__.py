"""Training of elastic families; import it as `hf_elastic.trainers`."""

try:
    from .curriculum import Curriculum, Stage
    from .elastic_distillation_config import ElasticDistillationConfig
    from .elastic_distillation_trainer import ElasticDistillationTrainer
    from .losses import chunked_divergence, divergence, hidden_distance
    from .verdict import Verdict
except ModuleNotFoundError as error:
    if error.name not in ("peft", "trl"):
        raise
    raise ModuleNotFoundError(
        f"hf_elastic.trainers needs {error.name}: pip install 'hf-elastic[train]'", name=error.name
    ) from error

__all__ = [
    "Curriculum",
    "ElasticDistillationConfig",
    "ElasticDistillationTrainer",
    "Stage",
    "Verdict",
    "chunked_divergence",
    "divergence",
    "hidden_distance",
]
