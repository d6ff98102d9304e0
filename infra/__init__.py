"""What every stage stands on: errors, config, storage, media, Ray, tracking, lineage, services."""
