# The course for a JupyterHub, a devcontainer or one's own machine.
#   docker build --tag refusal-mechanics-labs .
#   docker run --rm --publish 8888:8888 --volume labs:/home/student/labs refusal-mechanics-labs
# The volume keeps the work when the container ends.
# A hub starts `jupyterhub-singleuser` in it: give the hub's version with --build-arg JUPYTERHUB=5.4.0.
# On Linux pip brings the CUDA build of torch. For the small CPU build add --build-arg TORCH_INDEX=... with the address
# that PyTorch's "Get started" page gives for pip and CPU.
FROM python:3.11-slim-bookworm

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# Debian keeps one version of each package.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 student

WORKDIR /opt/course
COPY constraints.txt ./
ARG TORCH_INDEX=""
# constraints.txt has the version.
# hadolint ignore=DL3013
RUN torch="$(grep '^torch==' constraints.txt)" \
    && pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$torch"

COPY pyproject.toml README.md LICENSE LICENSE-notebooks.md NOTICE ./
COPY refusallab ./refusallab
COPY smallmodels ./smallmodels
COPY grader ./grader
ARG JUPYTERHUB=""
RUN pip install --no-cache-dir --constraint constraints.txt '.[lab,gguf]' \
    && if [ -n "$JUPYTERHUB" ]; then pip install --no-cache-dir "jupyterhub==$JUPYTERHUB"; fi

COPY --chown=student labs /home/student/labs
USER 1000
WORKDIR /home/student
EXPOSE 8888
CMD ["jupyter", "lab", "--ip=0.0.0.0", "--no-browser", "--ServerApp.root_dir=/home/student/labs"]
