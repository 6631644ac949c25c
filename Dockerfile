# A reranker as a system for TIREx. TIRA's variables name the input and output directories. The built image needs no network.
#
#   docker build --build-arg TORCH_INDEX=URL .                  torch from PyTorch's index of CPU wheels; the image has 1.9 GB
#   docker build .                                              torch from the package index, with CUDA; the image has 5.9 GB and also works without a GPU
#   docker build --build-arg MODEL=webis/monoelectra-base .     the image contains the model; otherwise mount the hub's cache at ~/.cache/huggingface/hub
#   docker build --build-arg RUN_AS=root .                      if only root may write to the output directory
ARG BASE=python:3.12-slim
FROM ${BASE}
ARG TORCH_INDEX=
ARG MODEL=
ARG RUN_AS=lit

COPY . /opt/pyterrier-lit
RUN TORCH_INDEX="${TORCH_INDEX}" /opt/pyterrier-lit/.ci/image install /opt/environment

# TIRA mounts models below /root, so /root is the home of the ordinary user
RUN [ "${RUN_AS}" = root ] || { useradd --home-dir /root --no-create-home "${RUN_AS}" && chown -R "${RUN_AS}" /root; }
USER ${RUN_AS}
ENV HOME=/root PATH=/opt/environment/bin:${PATH}
RUN MODEL="${MODEL}" /opt/pyterrier-lit/.ci/image bake /opt/environment

ENV HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
RUN /opt/pyterrier-lit/.ci/image check /opt/environment
WORKDIR /tmp
CMD ["python", "-m", "pyterrier_lit", "tirex", "--help"]
