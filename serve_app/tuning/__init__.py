"""Finds the settings of a model that serve a workload best on this machine, by measuring them.

A `space` has the settings that may change, and the plan cuts from it what has no room. A `search` proposes the next one
by what was measured before. A `trial` serves it with a Ray of its own, sends it the `workload`, and a `journal` keeps
what came out of it. An `objective` says which of two is better, and a `report` shows all of them.
"""
