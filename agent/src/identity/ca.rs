//! The certificate authority of local mode: a directory that several agents share.
//!
//! `app` opens it for `--ca-dir` and hands it to `manager` as the [`Signer`]. The directory holds
//! `tls.crt` (the issuer, and intermediates if any), `tls.key` (its key, mode 0600) and `ca.crt`
//! (every anchor to be trusted). Whoever comes first makes them, under a lock; all later agents
//! find the same authority.
//!
//! **Rotation** is a matter of files: add the new anchor to `ca.crt`; when every agent has it,
//! replace `tls.crt` and `tls.key`; a day later remove the old anchor. The files are looked at
//! each second. What does not fit together (a replacement half done, a typing error) is reported
//! and the last good state goes on signing.
//!
//! **What is signed** is built here from the request's public key and the one identity that was
//! asked for, whatever else the request says.

use std::{
    fs::{self, File, OpenOptions},
    future::Future,
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use rcgen::KeyPair;
use rustls::pki_types::{CertificateDer, pem::PemObject};
use tokio::sync::watch;
use zeroize::Zeroizing;

use crate::state::Identity;

use super::{
    Bundle, SignError, Signed, Signer,
    authority::{Authority, Part, is_self_signed, self_signed},
    clock::Clock,
    csr::believed_key,
    spiffe::parse_spiffe_id,
};

pub use super::authority::{LIFE, SKEW};

/// From when on a person is told that the authority ends.
const CA_WARNING: Duration = Duration::from_secs(30 * 24 * 3600);
const POLL: Duration = Duration::from_secs(1);
/// Certificates and keys are small; anything longer is not one.
const MAX_FILE: u64 = 1024 * 1024;

/// A certificate authority in a directory.
pub struct LocalCa {
    dir: PathBuf,
    trust_domain: Arc<str>,
    /// How long what is signed lives.
    life: Duration,
    clock: Arc<dyn Clock>,
    /// What signs now. Replaced whole when the files change.
    authority: ArcSwap<Authority>,
    bundle: watch::Sender<Arc<Bundle>>,
}

#[derive(Debug, thiserror::Error)]
pub enum CaError {
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error(
        "{} has mode {mode:04o} and owner {owner}, others could {danger}; run: chown {us} '{0}' && chmod {right:o} '{0}'",
        path.display()
    )]
    Permissions {
        path: PathBuf,
        mode: u32,
        owner: u32,
        us: u32,
        right: u32,
        danger: &'static str,
    },
    #[error("{} is missing while other files of the authority are there; {remedy}", path.display())]
    Missing { path: PathBuf, remedy: &'static str },
    #[error("{}: {reason}", path.display())]
    Unusable { path: PathBuf, reason: String },
    #[error("cannot make an authority: {0}")]
    Make(#[from] rcgen::Error),
}

impl LocalCa {
    /// Opens the directory, making it and the authority in it if there is none. Waits while
    /// another agent does the same.
    pub fn open(
        dir: &Path,
        trust_domain: Arc<str>,
        life: Duration,
        clock: Arc<dyn Clock>,
    ) -> Result<Arc<Self>, CaError> {
        make_dir(dir)?;
        let _lock = lock(dir)?;
        make_what_is_missing(dir, &trust_domain, clock.now())?;
        let (authority, bundle) = load(dir, &trust_domain, &clock)?;
        warn_if_ending(dir, &authority, clock.now());
        Ok(Arc::new(Self {
            dir: dir.to_owned(),
            trust_domain,
            life,
            clock,
            authority: ArcSwap::from_pointee(authority),
            bundle: watch::Sender::new(Arc::new(bundle)),
        }))
    }

    /// Opens the directory if the whole authority is there, and makes nothing: for who knows that
    /// there was one, and must not mistake a directory that is away for a new one.
    pub fn open_existing(
        dir: &Path,
        trust_domain: Arc<str>,
        life: Duration,
        clock: Arc<dyn Clock>,
    ) -> Result<Arc<Self>, CaError> {
        let (crt, key, anchors) = paths(dir);
        for path in [crt, key, anchors] {
            fs::metadata(&path).map_err(io_error("find", &path))?;
        }
        Self::open(dir, trust_domain, life, clock)
    }

    /// Follows the files until dropped (it runs forever; its owner aborts it at drain).
    pub async fn watch(self: Arc<Self>) {
        let mut seen = stamps(&self.dir);
        // A file may change twice within one tick of the file system's clock, so a change is
        // followed by one more look at the contents. The first look is for what happened between
        // `open` and here.
        let mut looks = 1_u8;
        let mut reported = None;
        let mut ticks = tokio::time::interval(POLL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let now = stamps(&self.dir);
            if now != seen {
                seen = now;
                looks = 2;
            }
            if looks == 0 {
                continue;
            }
            match self.reload() {
                Ok(()) => {
                    looks -= 1;
                    reported = None;
                }
                // Not counted as a look: it is tried again until it fits.
                Err(error) => {
                    let error = error.to_string();
                    // A replacement of three files is seen half done now and then: the first
                    // failure is not worth a person's attention, the same one again is.
                    match &reported {
                        None => reported = Some((error, false)),
                        Some((before, told)) if *before != error || !told => {
                            tracing::warn!(
                                dir = %self.dir.display(),
                                %error,
                                "the changed authority is not usable, the last good one signs on"
                            );
                            reported = Some((error, true));
                        }
                        Some(_) => {}
                    }
                }
            }
        }
    }

    /// Reads the directory again; on an error everything stays as it was.
    pub fn reload(&self) -> Result<(), CaError> {
        let (authority, bundle) = load(&self.dir, &self.trust_domain, &self.clock)?;
        warn_if_ending(&self.dir, &authority, self.clock.now());
        // Anchors first: nothing may be signed that our own agents would not believe yet.
        self.bundle.send_if_modified(|current| {
            let changed = **current != bundle;
            if changed {
                tracing::info!(
                    anchors = bundle.anchors.len(),
                    "the trust bundle has changed"
                );
                *current = Arc::new(bundle);
            }
            changed
        });
        self.authority.store(Arc::new(authority));
        Ok(())
    }

    fn sign_now(&self, identity: &Identity, csr: &[u8]) -> Result<Signed, SignError> {
        let refused = |reason: String| SignError::Refused {
            identity: identity.clone(),
            reason,
        };
        if identity.trust_domain != self.trust_domain {
            return Err(refused(format!(
                "its trust domain is not {}",
                self.trust_domain
            )));
        }
        parse_spiffe_id(&identity.to_string()).map_err(|error| refused(error.to_string()))?;
        let key = believed_key(csr).map_err(|error| refused(error.to_string()))?;
        self.authority
            .load()
            .sign(identity, &key, self.clock.now(), self.life)
            .map_err(SignError::Unavailable)
    }
}

impl Signer for LocalCa {
    fn sign<'a>(
        &'a self,
        identity: &'a Identity,
        csr: Vec<u8>,
    ) -> Pin<Box<dyn Future<Output = Result<Signed, SignError>> + Send + 'a>> {
        Box::pin(async move { self.sign_now(identity, &csr) })
    }

    fn bundle(&self) -> watch::Receiver<Arc<Bundle>> {
        self.bundle.subscribe()
    }
}

fn make_dir(dir: &Path) -> Result<(), CaError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(io_error("create", dir))?;
    check_permissions(dir, 0o022, 0o700, "replace the authority")
}

/// Held until dropped. The lock file stays: removing it would let two agents lock two files.
fn lock(dir: &Path) -> Result<File, CaError> {
    let path = dir.join(".lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .map_err(io_error("open", &path))?;
    file.lock().map_err(io_error("lock", &path))?;
    Ok(file)
}

/// Under the lock. The order (key, certificate, anchors) lets an agent that finds the work of one
/// that died in the middle finish it.
fn make_what_is_missing(dir: &Path, trust_domain: &str, now: SystemTime) -> Result<(), CaError> {
    let (crt, key, anchors) = paths(dir);
    let exists = |path: &Path| path.try_exists().map_err(io_error("look for", path));
    match (exists(&crt)?, exists(&key)?, exists(&anchors)?) {
        (true, true, true) => Ok(()),
        (false, has_key, false) => {
            let pair = if has_key {
                read_key(&key)?
            } else {
                let pair = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
                write(&key, 0o600, pair.serialize_pem().as_bytes())?;
                pair
            };
            let certificate = self_signed(&pair, trust_domain, now)?;
            write(&crt, 0o644, certificate.as_bytes())?;
            write(&anchors, 0o644, certificate.as_bytes())?;
            tracing::info!(dir = %dir.display(), trust_domain, "made a certificate authority");
            Ok(())
        }
        (true, true, false) => {
            let pem = read(&crt)?;
            let chain = CertificateDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>();
            if chain.is_ok_and(|chain| chain.len() == 1 && is_self_signed(&chain[0])) {
                write(&anchors, 0o644, &pem)
            } else {
                Err(CaError::Missing {
                    path: anchors,
                    remedy: "put the root certificates that tls.crt leads to there, as PEM",
                })
            }
        }
        (true, false, true | false) => Err(CaError::Missing {
            path: key,
            remedy: "put the private key of tls.crt there, as PKCS#8 PEM with mode 0600",
        }),
        (false, true | false, true) => Err(CaError::Missing {
            path: crt,
            remedy: "put the issuing certificate there, as PEM, or move ca.crt away to start anew",
        }),
    }
}

/// The directory as it stands, if all of it is good.
fn load(
    dir: &Path,
    trust_domain: &Arc<str>,
    clock: &Arc<dyn Clock>,
) -> Result<(Authority, Bundle), CaError> {
    let (crt, key, ca) = paths(dir);
    check_permissions(&crt, 0o022, 0o644, "replace the issuer")?;
    check_permissions(&ca, 0o022, 0o644, "add an anchor")?;
    let pair = Zeroizing::new(secret(&key)?);
    let read = Authority::read(&read(&crt)?, &pair, &read(&ca)?, trust_domain, clock);
    read.map_err(|unusable| CaError::Unusable {
        path: match unusable.part {
            Part::Chain => crt,
            Part::Key => key,
            Part::Anchors => ca,
        },
        reason: unusable.reason,
    })
}

fn warn_if_ending(dir: &Path, authority: &Authority, now: SystemTime) {
    match authority.not_after.duration_since(now) {
        Ok(left) if left > CA_WARNING => {}
        Ok(left) => tracing::warn!(
            dir = %dir.display(),
            days = left.as_secs() / 86_400,
            "the authority's certificate ends soon: add a new one to ca.crt and rotate"
        ),
        Err(_) => tracing::warn!(
            dir = %dir.display(),
            "the authority's certificate has expired, nothing can be signed: rotate it"
        ),
    }
}

fn paths(dir: &Path) -> (PathBuf, PathBuf, PathBuf) {
    (dir.join("tls.crt"), dir.join("tls.key"), dir.join("ca.crt"))
}

/// What tells that a file is not the one that was read.
fn stamps(dir: &Path) -> [Option<(u64, u64, i64, i64)>; 3] {
    let (crt, key, ca) = paths(dir);
    [crt, key, ca].map(|path| {
        let meta = fs::metadata(path).ok()?;
        Some((meta.ino(), meta.len(), meta.ctime(), meta.ctime_nsec()))
    })
}

/// The key's file, which nobody else may read.
fn secret(path: &Path) -> Result<Vec<u8>, CaError> {
    check_permissions(path, 0o077, 0o600, "sign as anybody")?;
    read(path)
}

fn read_key(path: &Path) -> Result<KeyPair, CaError> {
    let pem = Zeroizing::new(secret(path)?);
    let pem = str::from_utf8(&pem).ok();
    // The library's reason is not repeated: it could carry a part of what it read.
    let pair = pem.and_then(|pem| KeyPair::from_pem(pem).ok());
    pair.ok_or_else(|| CaError::Unusable {
        path: path.to_owned(),
        reason: "is not a private key in PEM form (PKCS#8, SEC1 or PKCS#1)".to_owned(),
    })
}

fn check_permissions(
    path: &Path,
    forbidden: u32,
    right: u32,
    danger: &'static str,
) -> Result<(), CaError> {
    let meta = fs::metadata(path).map_err(io_error("read", path))?;
    let (mode, owner) = (meta.mode() & 0o7777, meta.uid());
    let us = nix::unistd::geteuid().as_raw();
    if mode & forbidden == 0 && (owner == us || owner == 0) {
        Ok(())
    } else {
        Err(CaError::Permissions {
            path: path.to_owned(),
            mode,
            owner,
            us,
            right,
            danger,
        })
    }
}

fn read(path: &Path) -> Result<Vec<u8>, CaError> {
    let length = fs::metadata(path).map_err(io_error("read", path))?.len();
    if length > MAX_FILE {
        return Err(CaError::Unusable {
            path: path.to_owned(),
            reason: format!("has {length} bytes, at most {MAX_FILE} are read"),
        });
    }
    fs::read(path).map_err(io_error("read", path))
}

/// Whole or not at all, also for a reader without the lock.
fn write(path: &Path, mode: u32, content: &[u8]) -> Result<(), CaError> {
    let fresh = path.with_extension("new");
    let attempt = || -> io::Result<()> {
        match fs::remove_file(&fresh) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let mut file = OpenOptions::new()
            .create_new(true)
            .write(true)
            .mode(mode)
            .open(&fresh)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&fresh, path)?;
        path.parent()
            .map_or(Ok(()), |dir| File::open(dir)?.sync_all())
    };
    attempt().map_err(io_error("write", path))
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CaError {
    move |source| CaError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests;
