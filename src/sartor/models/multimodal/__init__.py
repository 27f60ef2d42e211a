"""Native multimodal bases: image-text-to-text and audio models of transformers."""
