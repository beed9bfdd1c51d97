"""One- and few-shot segmentation from attention maps."""
