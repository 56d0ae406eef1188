"""Chain of LoRA fine-tuning (arXiv 2401.04151)."""

__version__ = "0.1.0"
