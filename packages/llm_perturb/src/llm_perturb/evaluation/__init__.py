"""Models, corpora and the loss: the evaluation setup that discovery and instrument share."""
