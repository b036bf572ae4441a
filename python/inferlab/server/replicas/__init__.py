"""One server, many replicas: each holds a pipeline, Ray Serve keeps them alive, an ingress chooses.

`options` says how many and how large, `messages` carries an HTTP request to a replica and back what
it answers, `forward` is the ingress (who is asked, what is asked again), `beginnings` and `ranking`
say who is asked first, `figures` puts their metrics together. These know nothing of Ray.
`deployments` and `router` do, and `process` is `inferlab serve --replicas`.
"""
