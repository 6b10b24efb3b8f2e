"""One size of a model: cut, live, masked, trained."""
