"""Serve an exported model over HTTP: `python serve.py` (run `python export.py` first).

    POST /v1/segment                 an image file → its mask, as PNG, a volume's in kind. With the
                                     header Accept also JSON (COCO RLE), GeoJSON, DICOM SEG, TIFF
    GET  /v1/model                   which model is served
    POST /v2/models/unet/infer       Open Inference Protocol v2, as Triton and KServe speak it
    POST /v1/models/unet:predict     TensorFlow Serving's REST, also with /versions/1, /metadata
    POST /invocations, GET /ping     SageMaker. Vertex AI's routes are those that it sets in
                                     AIP_PREDICT_ROUTE and AIP_HEALTH_ROUTE
    GET  /                           a web page that shows the mask of an image
    GET  /livez, /readyz, /metrics   for orchestrators and Prometheus

Needs `pip install -r requirements-serve.txt`. Images are not stored. Nothing of an image is logged,
nor is its name.
"""

import utils
from serving.config import Config, check_config


def serve(config: Config) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises UserError."""
    check_config(config)
    # Imported here, so that --help is fast and a missing package is named in one line.
    utils.require("fastapi", "requirements-serve.txt")
    from serving.app import make_app
    from serving.server import Server, address, open_socket, server_settings
    from serving.service import Service

    service = Service(config)
    listener = open_socket(config.host, config.port)
    service.metrics.watch(listener)
    settings = server_settings(make_app(service), config, listener)

    models = [
        f"{one.title} ({one.network.engine}, {one.network.precision})"
        for one in service.repository.served.values()
    ]
    print(
        f"{address(config, listener)} serves {config.model}: {', '.join(models)}; stop it with "
        "Ctrl-C",
        flush=True,
    )
    Server(settings, service).run([listener])


if __name__ == "__main__":
    utils.run_script(serve, Config, description=__doc__)
