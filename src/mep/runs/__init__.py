"""What `mep train`, `mep verify` and the lab share: data, models, optimizers, training, records, reports."""
