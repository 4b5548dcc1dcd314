"""Accounts of a federation on a RabbitMQ: who there is, what each may do, and the commands that make it so."""
