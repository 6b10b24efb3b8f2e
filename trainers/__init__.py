"""Training of elastic families; import it as `hf_elastic.trainers`."""

from .curriculum import Curriculum, Stage
from .elastic_distillation_config import ElasticDistillationConfig
from .elastic_distillation_trainer import ElasticDistillationTrainer
from .losses import chunked_divergence, divergence, hidden_distance

__all__ = [
    "Curriculum",
    "ElasticDistillationConfig",
    "ElasticDistillationTrainer",
    "Stage",
    "chunked_divergence",
    "divergence",
    "hidden_distance",
]
