"""Push of Datasets, Adapters and exports to a Hugging Face hub, and their return."""
