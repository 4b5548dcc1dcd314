"""RabbitMQ: the only folder that knows pika and tenacity, and a private node for tests and demonstrations."""
