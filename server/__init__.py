"""The meeting of the fleet: rounds, aggregation, durable state. No torch."""
