"""Push of Datasets and Adapters to a Hugging Face hub, and their return."""
