"""A real Slurm on this machine alone, with made-up GPUs: for tests, as root, without systemd.

    python tests/slurm/cluster.py FOLDER      starts it, prints the environment that finds it, and stays until Ctrl-C

Debian: apt-get install slurm-wlm munge
"""
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch")

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,batch_sched_delay=0,sched_min_interval=100000,requeue_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=10
KillWait=5
MinJobAge=30
MaxArraySize={max_array}
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} Boards=1 SocketsPerBoard=1 CoresPerSocket={cores} ThreadsPerCore=1 RealMemory=64000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=long Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
PartitionName=gpu Nodes={host} MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
PartitionName=preempt Nodes={host} MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


def installed() -> bool:
    "Whether Slurm can be started here"
    return os.geteuid() == 0 and all(shutil.which(p) for p in PROGRAMS)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Cluster:
    "One controller, one node; `with Cluster(folder) as cluster:`"
    def __init__(self, folder: Path, gpus: int = 4, max_array: int = 1001):
        self.folder, self.gpus, self.max_array = Path(folder).resolve(), gpus, max_array
        self.host, self.processes = socket.gethostname().split(".")[0], {}
        self.environment = {"SLURM_CONF": str(self.folder/"slurm.conf")}

    def __enter__(self):
        try: self.begin()
        except BaseException: self.__exit__(); raise
        return self

    def begin(self):
        for name in ("state", "spool"): (self.folder/name).mkdir(parents=True, exist_ok=True)
        for part in (self.folder, *self.folder.parents):
            if part.owner() == getpass.getuser() and part != Path("/") and part.stat().st_mode & 0o022 and not part.stat().st_mode & 0o1000: part.chmod(part.stat().st_mode & ~0o022)
        for n in range(self.gpus): subprocess.run(["mknod", self.folder/f"gpu{n}", "c", "1", "3"], check=True)
        (self.folder/"gres.conf").write_text("".join(f"Name=gpu File={self.folder}/gpu{n}\n" for n in range(self.gpus)))
        keys = dict(host=self.host, port=free_port(), node_port=free_port(), user=getpass.getuser(), folder=self.folder, max_array=self.max_array, cores=4, gpus=self.gpus)
        (self.folder/"slurm.conf").write_text(CONFIG.format(**keys).strip() + "\nSlurmdParameters=config_overrides\n")
        key = self.folder/"munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        self.start("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self.folder}/munge.socket", f"--pid-file={self.folder}/munged.pid", f"--log-file={self.folder}/munged.log", f"--seed-file={self.folder}/munge.seed")
        self.wait(lambda: (self.folder/"munge.socket").exists())
        self.start("slurmctld", "-D")
        self.start_node()

    def start(self, program: str, *words: str):
        with open(self.folder/f"{program}.out", "ab") as out:
            self.processes[program] = subprocess.Popen([program, *words], stdout=out, stderr=out, env={**os.environ, **self.environment}, start_new_session=True)

    def start_node(self):
        self.start("slurmd", "-D")
        self.wait(lambda: self.node_state() in ("idle", "mixed", "allocated"))

    def node_state(self) -> str:
        return self.ask("sinfo", "-h", "-o", "%T").strip().rstrip("*")

    def ask(self, *words: str) -> str:
        return subprocess.run(words, capture_output=True, text=True, env={**os.environ, **self.environment}).stdout

    def wait(self, what, seconds: float = 120):
        until = time.monotonic() + seconds
        while not what():
            if time.monotonic() > until: raise TimeoutError("\n".join(f"{p.name}: {p.read_text(errors='replace')[-1500:]}" for p in [*self.folder.glob("*.log"), *self.folder.glob("*.out")]))
            time.sleep(0.1)

    def kill_node(self):
        "As if it were switched off: the daemon and everything that it started, at once"
        family, parents = {self.processes["slurmd"].pid}, {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try: name, _, rest = stat.read_text().rpartition(")")
            except OSError: continue
            parents[int(stat.parent.name)] = int(rest.split()[1]), name
        family |= {p for p, (_, name) in parents.items() if "slurmstepd" in name and self.is_ours(p)}
        while more := {p for p, (parent, _) in parents.items() if parent in family} - family: family |= more
        for pid in family:
            try: os.kill(pid, signal.SIGKILL)
            except ProcessLookupError: pass
        self.processes.pop("slurmd").wait()

    def is_ours(self, pid: int) -> bool:
        try: return str(self.folder).encode() in Path(f"/proc/{pid}/environ").read_bytes()
        except OSError: return False

    def __exit__(self, *_):
        self.ask("scancel", "--state=RUNNING", f"--user={getpass.getuser()}")
        self.ask("scancel", f"--user={getpass.getuser()}")
        for _ in range(100):
            if not self.ask("squeue", "-h").strip(): break
            time.sleep(0.2)
        if "slurmd" in self.processes: self.kill_node()
        for process in self.processes.values():
            process.terminate()
            try: process.wait(10)
            except subprocess.TimeoutExpired: process.kill(); process.wait()


if __name__ == "__main__":
    if not installed(): sys.exit("needs root, and slurm-wlm and munge: apt-get install slurm-wlm munge")
    with Cluster(Path(sys.argv[1])) as running:
        print(*(f"export {k}={v}" for k, v in running.environment.items()), sep="\n", flush=True)
        try: signal.pause()
        except KeyboardInterrupt: pass
