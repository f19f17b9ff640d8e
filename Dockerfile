# CPU image:  docker build -t lqkd .  &&  docker run --rm -v "$PWD/runs:/home/lqkd/runs" lqkd fit --config configs/quickstart.yaml
FROM python:3.11-slim

RUN useradd --create-home --uid 1000 lqkd
WORKDIR /home/lqkd

# The CPU builds of torch are a tenth of the size of the CUDA ones; a layer of its own survives changes of the code.
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu "torch>=2.6" "torchvision>=0.21"

COPY --chown=lqkd pyproject.toml README.md LICENSE ./
COPY --chown=lqkd lqkd lqkd
RUN pip install --no-cache-dir .
COPY --chown=lqkd configs configs

USER lqkd
ENTRYPOINT ["python", "-m", "lqkd"]
CMD ["--help"]
