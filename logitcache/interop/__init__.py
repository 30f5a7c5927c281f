"""Other formats and places: Parquet, the Hugging Face hub, DistillKit."""
