"""Native multi-modal bases: transformers' image-text-to-text and audio models, opened by name like any base."""
