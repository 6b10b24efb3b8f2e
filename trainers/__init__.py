"""Training of elastic families; import it as `hf_elastic.trainers`."""
