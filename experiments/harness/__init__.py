"""What every experiment shares: claims, records, queue, tracking, models, data, training, evaluation."""
