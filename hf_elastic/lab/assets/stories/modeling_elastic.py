"""Lets programs that never import hf_elastic load this checkpoint, with trust_remote_code=True. Nothing else is in here."""

try:
    from hf_elastic import ElasticConfig, ElasticForCausalLM, ElasticModel
except ImportError as error:
    raise ImportError("this elastic checkpoint is loaded by the package hf_elastic: pip install hf-elastic") from error

__all__ = ["ElasticConfig", "ElasticForCausalLM", "ElasticModel"]
