//! The node agent's binary: reads the command line, picks the allocator, and lets the library do
//! the work.

use std::{
    env,
    ffi::c_char,
    io::{self, Write},
    process::ExitCode,
};

use clap::Parser;
use picomesh::{
    admin, app,
    config::{self, Cli, Command},
    datapath::{self, Datapath, DatapathSettings, Generation},
};
use picomesh_common::config::rule;
use tokio::runtime;

/// glibc's allocator keeps what a burst took, worst on arm64; this one gives it back.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Freed pages go back after a second instead of ten, at once and not by way of `MADV_FREE` (the
/// kernel would count them as ours until it is short of memory). Few arenas: there are as many
/// data threads as cores, and each more arena holds on to pages of its own.
///
/// An arm64 build for boards with 16 KiB pages (Raspberry Pi 5) must set
/// `JEMALLOC_SYS_WITH_LG_PAGE=16`: jemalloc takes its page size from the machine that builds it,
/// and aborts on one with larger pages.
// SAFETY: the symbol is the one jemalloc (built with its prefix) looks for, nobody else defines it,
// and it has the type that jemalloc expects: a pointer to a C string that lives forever.
#[unsafe(export_name = "_rjem_malloc_conf")]
pub static MALLOC_CONF: MallocConf = MallocConf(
    c"dirty_decay_ms:1000,muzzy_decay_ms:0,narenas:4,tcache_max:8192,abort_conf:false".as_ptr(),
);

#[repr(transparent)]
pub struct MallocConf(*const c_char);

// SAFETY: the pointer is to a constant that nobody writes to.
unsafe impl Sync for MallocConf {}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The end of the process: where this cannot be written there is nobody to tell.
            let _ = writeln!(io::stderr(), "picomesh-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Run(args) => app::run(args.config(|name| env::var_os(name))?),
        Command::Controller(args) => app::control::run(args.config(|name| env::var_os(name))?),
        Command::Signer(args) => app::control::run(args.config(|name| env::var_os(name))?),
        Command::Cleanup(config::CleanupArgs { dirs, cni, wait }) => {
            let install = cni.install(&dirs.run_dir)?;
            let settings = DatapathSettings {
                bpf_dir: dirs.bpf_dir,
                run_dir: dirs.run_dir,
                data_threads: 1,
                force_clsact: false,
                fail_open: false,
                rules: rule::ALL,
                generation: Generation::default(),
            };
            // An agent that runs would enrol its pods again. Without the directory none does.
            let exists = settings.run_dir.exists();
            let held = exists.then(|| app::RunDir::open(&settings.run_dir));
            let held = held.transpose()?;
            let pinned = settings.bpf_dir.exists();
            let pins = pinned.then(|| app::BpfDir::open(&settings.bpf_dir, &settings.run_dir));
            let _pins = pins.transpose()?;
            // While the plugin is there, pods of the mesh do not start without an agent.
            let unplugged = app::finding::unplug(install);
            let cleaned = small_runtime()?.block_on(Datapath::cleanup(settings));
            if let Some(held) = held {
                held.remove()?;
            }
            cleaned?;
            unplugged?;
            if wait {
                small_runtime()?.block_on(app::asked_to_end())?;
            }
            Ok(())
        }
        Command::Debug(args) => {
            let text = small_runtime()?.block_on(admin::show::run(args))?;
            print(&text)
        }
        Command::Probe(args) => {
            let probed = admin::probe::run(&args.run_dir, args.probe);
            let text = small_runtime()?.block_on(probed)?;
            print(&format!("{text}\n"))
        }
        Command::MountBpffs { directory } => {
            let text = match datapath::mount_bpffs(&directory)? {
                true => "mounted a bpffs",
                false => "there is a bpffs already",
            };
            print(&format!("{}: {text}\n", directory.display()))
        }
    }
}

fn print(text: &str) -> anyhow::Result<()> {
    // `debug pods | head` closes the pipe: that is no failure.
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

fn small_runtime() -> io::Result<runtime::Runtime> {
    runtime::Builder::new_current_thread().enable_all().build()
}
