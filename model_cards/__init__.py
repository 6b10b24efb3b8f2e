"""Templates of model cards, which `hf_elastic.hub.cards` fills in; importable as `hf_elastic.model_cards`."""
