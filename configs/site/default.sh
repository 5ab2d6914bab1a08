# Settings of your cluster. Every script in slurm/ and `bigtx slurm` read this file, so no script has to be changed.
# Copy this file, then name the copy: export BIGTX_SITE=/path/to/mine.sh, or bigtx slurm submit ... site=mine.sh

# Options of sbatch. They override the #SBATCH lines of a script; options on the command line override them.
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

# Folders that keep compiled kernels between starts.
#export TORCHINDUCTOR_CACHE_DIR=/local/$USER/inductor TRITON_CACHE_DIR=/local/$USER/triton

# Words before `bigtx` on every node, for example of a container (tools/container).
container=()
#container=(apptainer exec --nv --bind /data bigtx.sif)

# More options of srun.
srun_options=()
#srun_options=(--container-image=/images/bigtx.sqsh --container-mounts=/data)   # pyxis

# Before each start on several nodes `bigtx doctor` checks them, and the job is requeued without slow or broken nodes. A
# node is slow below half of the median. For jobs of two nodes, set the least sufficient speed in GB/s.
doctor_options=()
#doctor_options=(least_bandwidth=10)
#export BIGTX_PREFLIGHT=off
