"""Many devices and one server in virtual time: the agent, rounds and aggregators of a real fleet, on one machine.

settings   fleet.toml's [simulation] → frozen values          clock      events in the order of virtual time
fleet      devices of the catalogue → plans and slots          links      transfers, shared bottlenecks
partition  who has which examples                              traces     who is here when
work       one device's round as a pure function               battery    charge, and the governor's pauses
engines    where that is computed                              world      all of it together
"""
