"""What happens, in which order. The only importer of Prefect."""
