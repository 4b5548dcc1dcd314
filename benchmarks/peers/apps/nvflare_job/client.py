"""A script of the Client API: what came goes back."""

import nvflare.client as flare

flare.init()
while flare.is_running():
    model = flare.receive()
    if model is None:
        break
    flare.send(flare.FLModel(params=model.params, params_type=model.params_type, meta={"NUM_STEPS_CURRENT_ROUND": 1}))
