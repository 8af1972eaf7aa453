//! Clients that never tire: each opens one kind of connection after another from its pod, and tells
//! the ledger how each went.

use std::{
    collections::BTreeSet,
    io::{Read, Write},
    net::TcpStream,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow};
use picomesh_tests::{Pod, Service, client};

use super::{
    ledger::Attempt,
    stage::{SPREADS, Shared, Stage, Target},
    stream::Chance,
    talk::{self, How, Order, Script, Seen},
};

/// The kinds of traffic, and how many workers of a pod do each.
const KINDS: [(&str, usize); 6] = [
    ("short", 2),
    ("long", 4),
    ("bulk", 1),
    ("idle", 4),
    ("client closes first", 2),
    ("server closes first", 2),
];
const GATE: &str = "gate";
/// While agents are gone SYNs are sent again after 1, 2, 4 and 8 s.
const CONNECT: Duration = Duration::from_secs(20);

/// All workers of a soak. Dropping it ends them.
pub(crate) struct Workers {
    end: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

/// One worker: its place, what it does, and where it may go.
struct Worker {
    kind: &'static str,
    from: &'static str,
    pod: Pod,
    targets: Targets,
    shared: Arc<Shared>,
    end: Arc<AtomicBool>,
    chance: Chance,
}

#[derive(Clone)]
struct Targets {
    fixed: Vec<Target>,
    churn: Option<Service>,
}

impl Workers {
    pub(crate) fn start(stage: &Stage, seed: u64) -> Result<Self> {
        let mut workers = Self {
            end: Arc::default(),
            threads: Vec::new(),
        };
        let mut chance = Chance::new(seed);
        let pods = [&stage.alpha, &stage.beta, &stage.drifter];
        let steady: Vec<(String, usize)> = vec![("alpha".into(), 0), ("beta".into(), 1)];
        let direct: Vec<Target> = pods.iter().map(|i| Target::pod(&i.pod)).collect();
        let mut inside = direct.clone();
        inside.push(Target::service(&stage.service, &steady));
        let inside = Targets {
            fixed: inside,
            churn: Some(stage.churn.clone()),
        };
        // Services' addresses lead nowhere without the mesh.
        let outside = Targets {
            fixed: direct,
            churn: None,
        };
        let gate = Targets {
            fixed: vec![Target::pod(&stage.gate.pod)],
            churn: None,
        };
        for (from, pod, targets) in [
            ("alpha", &stage.alpha.pod, &inside),
            ("beta", &stage.beta.pod, &inside),
            ("legacy", &stage.legacy, &outside),
        ] {
            for (kind, count) in KINDS {
                // One outside the mesh is enough to see that it is served.
                let count = if from == "legacy" { 1 } else { count };
                for _ in 0..count {
                    workers.add(stage, kind, from, pod, targets, chance.next())?;
                }
            }
        }
        for _ in 0..2 {
            workers.add(stage, GATE, "alpha", &stage.alpha.pod, &gate, chance.next())?;
        }
        workers.intruder(stage)?;
        Ok(workers)
    }

    fn add(
        &mut self,
        stage: &Stage,
        kind: &'static str,
        from: &'static str,
        pod: &Pod,
        targets: &Targets,
        seed: u64,
    ) -> Result<()> {
        let mut worker = Worker {
            kind,
            from,
            pod: pod.clone(),
            targets: targets.clone(),
            shared: stage.shared.clone(),
            end: self.end.clone(),
            chance: Chance::new(seed),
        };
        let thread = pod.netns().spawn("soak-worker", move || worker.work())?;
        self.threads.push(thread);
        Ok(())
    }

    /// One outside the mesh who asks the vault, which serves only identities, again and again.
    fn intruder(&mut self, stage: &Stage) -> Result<()> {
        let (shared, end) = (stage.shared.clone(), self.end.clone());
        let vault = Target::pod(&stage.vault.pod);
        let thread = stage.legacy.netns().spawn("soak-intruder", move || {
            for at in vault.at.iter().cycle() {
                if end.load(Ordering::Relaxed) {
                    return;
                }
                thread::sleep(Duration::from_millis(100));
                shared.intrusions.fetch_add(1, Ordering::Relaxed);
                let Ok(mut stream) = client::connect(*at, Duration::from_secs(1)) else {
                    continue;
                };
                let script = Script {
                    connection: u64::MAX,
                    order: Order::ServerFirst,
                    rounds: 1,
                    up: 1,
                    down: 64,
                    pause: Duration::ZERO,
                };
                let told = stream.write_all(&script.header());
                if told.is_ok() && stream.read(&mut [0]).is_ok_and(|n| n > 0) {
                    let what = format!("the vault answered a client without identity at {at}");
                    shared.ledger.violation(what);
                }
            }
        })?;
        self.threads.push(thread);
        Ok(())
    }

    /// Ends them after what they are at.
    pub(crate) fn join(mut self) -> Result<()> {
        self.end.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread
                .join()
                .map_err(|_| anyhow!("a worker panicked; see above"))?;
        }
        Ok(())
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
    }
}

impl Worker {
    fn work(&mut self) {
        while !self.end.load(Ordering::Relaxed) {
            if self.shared.is_calm() {
                thread::sleep(Duration::from_millis(50));
                continue;
            }
            self.once();
            let pause = self.chance.between(5, 60);
            thread::sleep(Duration::from_millis(pause));
        }
    }

    fn once(&mut self) {
        let talking = self.shared.talks();
        let mut targets = self.targets.fixed.clone();
        if let Some(churn) = &self.targets.churn {
            targets.push(Target::service(churn, &self.shared.churn()));
        }
        let (Some(target), script) = (self.chance.one_of(&targets).cloned(), self.script()) else {
            return;
        };
        let Some(at) = self.chance.one_of(&target.at).copied() else {
            return;
        };
        let started = Instant::now();
        let seen = match connect(at) {
            Ok(stream) => talk::client(stream, &script, &self.shared.calm),
            Err(e) => Seen {
                sent: 0,
                received: 0,
                expected: 0,
                how: How::NotConnected(e.to_string()),
            },
        };
        let ended = Instant::now();
        if self.kind == GATE {
            self.judge_gate(&seen, ended);
        }
        let mut nodes = target.nodes;
        if self.from != "legacy" {
            nodes.extend(self.pod.node().map(|node| node.index()));
        }
        let attempt = Attempt {
            kind: self.kind,
            from: self.from,
            to: format!("{} at {at}", target.words),
            pods: target.pods,
            nodes,
            started,
            ended,
            seen,
        };
        self.shared.ledger.client(script.connection, attempt);
        drop(talking);
    }

    /// Whoever was answered while the gate was closed, was answered against the policy.
    fn judge_gate(&self, seen: &Seen, ended: Instant) {
        let closed = *self.shared.closed();
        if let Some(closed) = closed
            && ended > closed + SPREADS
            && seen.how == How::Whole
        {
            let late = (ended - closed).as_secs_f64();
            let what = format!("the gate served alpha {late:.1} s after it was closed: {seen}");
            self.shared.ledger.violation(what);
        }
    }

    fn script(&mut self) -> Script {
        let connection = NEXT.fetch_add(1, Ordering::Relaxed);
        let mut of = |order, rounds: (u64, u64), up, down, pause: (u64, u64)| Script {
            connection,
            order,
            rounds: self.chance.between(rounds.0, rounds.1) as u32,
            up: self.chance.between(1, up) as u32,
            down: self.chance.between(1, down) as u32,
            pause: Duration::from_millis(self.chance.between(pause.0, pause.1)),
        };
        const KB: u64 = 1 << 10;
        const MB: u64 = 1 << 20;
        match self.kind {
            "short" => of(Order::Rounds, (1, 3), 2 * KB, 32 * KB, (0, 0)),
            "long" => of(Order::Rounds, (100, 500), 4 * KB, 4 * KB, (20, 90)),
            // 64 KiB, then a pause: some 20 MB/s at most.
            "bulk" => of(Order::Together, (1, 1), 48 * MB, 48 * MB, (3, 10)),
            "idle" => of(Order::Rounds, (2, 2), KB, KB, (10_000, 40_000)),
            "client closes first" => of(Order::AfterFin, (1, 1), 256 * KB, MB, (0, 3_000)),
            "server closes first" => of(Order::ServerFirst, (1, 1), 256 * KB, MB, (0, 3_000)),
            // The gate: some outlast what is done to it.
            _ => of(Order::Rounds, (1, 100), KB, KB, (10, 100)),
        }
    }
}

static NEXT: AtomicU64 = AtomicU64::new(1);

fn connect(to: std::net::SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, CONNECT)?;
    stream.set_read_timeout(Some(talk::PATIENCE))?;
    stream.set_write_timeout(Some(talk::PATIENCE))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// The kinds a report lists, in this order.
pub(crate) fn kinds() -> BTreeSet<&'static str> {
    KINDS.iter().map(|(kind, _)| *kind).chain([GATE]).collect()
}
