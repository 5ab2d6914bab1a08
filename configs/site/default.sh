# What your cluster needs: every script in slurm/ and `bigtx slurm` read this file, and no script has to be changed.
# To have one of your own, copy it and name it: export BIGTX_SITE=/path/to/mine.sh, or bigtx slurm submit ... site=mine.sh

# Options of sbatch. A script's own #SBATCH lines are weaker than these, and options on the command line are stronger.
#export SBATCH_PARTITION=gpu
#export SBATCH_ACCOUNT=my-project
#export SBATCH_QOS=normal
#export SBATCH_TIMELIMIT=24:00:00
#export SBATCH_GRES=gpu:8          # GPUs of each node; bigtx starts a rank for each one that it finds
#export SBATCH_EXCLUSIVE=user      # whole nodes
#export SBATCH_CONSTRAINT=h100

# The environment of bigtx on every node.
#module load cuda/12.8
#source /path/to/venv/bin/activate
#export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0   # the network between nodes

# Where compiled kernels are kept from one start to the next.
#export TORCHINDUCTOR_CACHE_DIR=/local/$USER/inductor TRITON_CACHE_DIR=/local/$USER/triton

# What is put before bigtx on every node, for example a container (tools/container).
container=()
#container=(apptainer exec --nv --bind /data bigtx.sif)

# More options of srun.
srun_options=()
#srun_options=(--container-image=/images/bigtx.sqsh --container-mounts=/data)   # pyxis

# Before each start on several nodes, `bigtx doctor` looks at them, and the job is requeued without those that are slow or
# broken. A node is slow below half of the median of all; say what is slow in any case, in GB/s, for jobs of two nodes.
doctor_options=()
#doctor_options=(least_bandwidth=10)
#export BIGTX_PREFLIGHT=off
