# Two images of lqkd. For CPUs (the default):
#   docker build -t lqkd .
#   docker run --rm -v lqkd-runs:/home/lqkd/runs lqkd fit --config configs/quickstart.yaml
# For NVIDIA GPUs:
#   docker build -t lqkd:cuda --build-arg TORCH=cu128 .
#   docker run --rm --gpus all -v lqkd-runs:/home/lqkd/runs lqkd:cuda fit --config configs/quickstart.yaml
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
# Which builds of torch: cpu, or those of a CUDA release (cu126, cu128 ...), which bring all of CUDA but the driver.
ARG TORCH=cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/lqkd
ENV PATH=/opt/lqkd/bin:$PATH
WORKDIR /src

# What changes rarely comes first: a change of the code downloads and installs nothing again.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --index-url https://download.pytorch.org/whl/${TORCH} "torch>=2.6" "torchvision>=0.21"
COPY pyproject.toml ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
        print(*p['dependencies'], *p['optional-dependencies']['export'], sep='\n')" > requirements.txt \
    && pip install -r requirements.txt
COPY README.md LICENSE ./
COPY lqkd lqkd
RUN --mount=type=cache,target=/root/.cache/pip pip install --no-deps .

FROM python:${PYTHON}-slim
# A new volume takes the owner of runs; a folder of yours that is mounted there must let user 1000 write.
RUN useradd --create-home --uid 1000 lqkd && install --directory --owner=1000 --group=1000 /home/lqkd/runs
COPY --from=build /opt/lqkd /opt/lqkd
ENV PATH=/opt/lqkd/bin:$PATH
# As in NVIDIA's own base images, for engines that read these where Docker has --gpus; without a driver they do nothing.
ENV NVIDIA_VISIBLE_DEVICES=all
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /home/lqkd
COPY configs configs
USER 1000
ENTRYPOINT ["python", "-m", "lqkd"]
CMD ["--help"]
