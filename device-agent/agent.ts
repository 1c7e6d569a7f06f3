import { dirname } from 'node:path'
import { setTimeout as pause } from 'node:timers/promises'
import type { ApprovalSet, BodyOf, FirmwarePolicy, TrustBundle } from '@fleetkey/protocol/messages.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { DeviceId, GroupAddress } from '@fleetkey/protocol/ids.ts'
import { trustDigest } from '@fleetkey/protocol/transcript.ts'
import { deviceTopic, groupAddress, groupTopic, partsOfAddress } from '@fleetkey/protocol/topics.ts'
import { keyId, type SignedMessage } from '@fleetkey/protocol/signed.ts'
import { unsafeClockText } from '@fleetkey/tpm2/clock.ts'
import type { KeyBlob } from '@fleetkey/tpm2/device-keys.ts'
import { TpmError } from '@fleetkey/tpm2/errors.ts'
import { imaLimits } from '@fleetkey/tpm2/ima.ts'
import { imaPart, type ImaPart } from '@fleetkey/tpm2/ima-part.ts'
import { reopening } from '@fleetkey/tpm2/reopening.ts'
import { spkiOf } from '@fleetkey/tpm2/structures.ts'
import type { Transport } from '@fleetkey/tpm2/transport.ts'
import type { Attester } from './attesters/attester.ts'
import { openConsumers } from './consumers.ts'
import { openChannel, type Channel } from './channel.ts'
import type { Settings } from './config.ts'
import { checkServerTime, ConnectionRefused, openConnection, type Connection, type ConnectionOptions } from './connection.ts'
import { advance, initialCore, type Core, type Delivery, type Effect, type Event, type HeldKey, type Phase, type Take, type TimerName } from './core.ts'
import { openDeviceClock } from './device-clock.ts'
import { enrol, Refused } from './enrol.ts'
import { openDocument, type Document } from './files.ts'
import { isMediumError, piecesOf, type FileSystem } from './filesystem.ts'
import { openSoftwareHolder, openTpmHolder, type Holder } from './holder.ts'
import { factsOf, type Identity } from './identity.ts'
import { isIn, type Keyring } from './keyring.ts'
import { openLocalApi, type KeyChange, type LocalApi } from './local-api.ts'
import { localKeys, type LocalKeys } from './local-keys.ts'
import { openOutputs } from './outputs.ts'
import { prepareRenewal, renewedIdentity } from './renew.ts'
import { safeClock } from './safe-clock.ts'
import type { SecureElement } from './secure-element.ts'
import { openUsage, type UsageCounters } from './usage.ts'
import { openTlsMemory } from './tls.ts'
import { isTpmTrouble } from './tpm-trouble.ts'
import { openTrust, type Trust } from './trust.ts'
import { isTainted, judgeBundle, sourceOf, trustStore } from './trust-bundle.ts'
import { lockedWords } from './vault.ts'

/** Name and version that devices report. */
export const agentVersion = 'fleetkey-agent/0.1.0'

export interface AgentOptions {
  readonly settings: Settings
  /** For devices with a TPM (`settings.tpm`). */
  readonly openTpm?: () => Promise<Transport>
  /** A secure element that is in no file, for devices that enrol by factory identity. */
  readonly secureElement?: SecureElement
  readonly files: FileSystem
  /** Milliseconds since 1970. */
  readonly now: () => number
  /** Milliseconds since any moment, that nobody can set; the process's own unless told. */
  readonly monotonic?: () => number
  readonly random: (length: number) => Uint8Array
  readonly log: (line: string) => void
  /** Called after every durable step; fault tests end the agent there. */
  readonly step: (name: string) => void
  /** The way to the server; a TCP connection of this machine unless told. */
  readonly dial?: ConnectionOptions['dial']
  /** Takes the place of TLS and MQTT altogether; a simulated network has neither. */
  readonly connect?: typeof openConnection
  /** The firmware's event log when it is in no file. */
  readonly readEventLog?: () => Promise<Uint8Array>
  /** The kernel's list of measured files when it is in no file. */
  readonly readImaList?: () => AsyncIterable<Uint8Array>
}

/** `opening`: the TPM or the stored keys are not open yet; `failed`: it cannot run (see `problem`). */
export type AgentState = 'opening' | Exclude<Phase, 'starting'> | 'failed'

export interface AgentStatus {
  /** Null until it has an identity. */
  readonly device: string | null
  readonly state: AgentState
  readonly connected: boolean
  /** The running firmware is not approved for the keys that are here: none of them can be used. */
  readonly locked: boolean
  readonly holdings: readonly { readonly key: string; readonly epoch: number; readonly stage: 'installed' | 'active' }[]
  /** Epoch in use per key. */
  readonly current: Readonly<Record<string, number>>
  /** Last refusal by the server: its public code. */
  readonly lastRefusal: string | null
  /** What stands in the way right now, for a person; null when nothing does. */
  readonly problem: string | null
  /** End of the TLS certificate, milliseconds since 1970. */
  readonly tlsNotAfter: number | null
}

export interface Agent extends LocalKeys {
  status(): AgentStatus
  /** Called after every change of the status; the function returned ends that. */
  onChange(listener: (status: AgentStatus) => void): () => void
  /** Called when the epoch in use of a key changed, after files and hooks. */
  onKey(listener: (change: KeyChange) => void): () => void
  /** Finishes what is being written, says goodbye to the server, wipes keys from memory. */
  stop(): Promise<void>
  /** Drops everything at once, as power loss: nothing is written, sent or answered any more. */
  kill(): void
}

class Killed extends Error {
  override readonly name = 'Killed'
}

/** A broadcast that is not for this device. `ask`: for labels that it lacks. */
class NotForThisPlace extends Error {
  override readonly name = 'NotForThisPlace'
  readonly ask: boolean

  constructor(ask: boolean) {
    super('a broadcast for others')
    this.ask = ask
  }
}

/** Time floors reach the medium at most this often when nothing else is written. */
const timeEvery = 3_600_000
const maxInbox = 1_024
const tpmRetry = 5_000
/** Milliseconds that a TPM gets to free what is loaded when the agent stops. */
const tpmFarewell = 5_000

const messageOf = (thrown: unknown): string => (thrown instanceof Error ? thrown.message : String(thrown))

/** The moment, not the content, is at fault (full disk, TPM away or busy): nothing is stated to the server, it may work later. */
const isTransient = (thrown: unknown): boolean => {
  if (thrown instanceof TpmError) return (thrown.code & 0xf80) === 0x900
  return !(thrown instanceof Problem) || thrown.code === 'unavailable'
}

/**
 * Starts an agent: opens the TPM and what is stored, serves the keys at once, and keeps identity and keys current in the background. Never
 * throws; trouble shows in `status()` and in the log.
 */
export const startAgent = (options: AgentOptions): Agent => {
  const { settings, log } = options
  let dead = false
  let core: Core = initialCore
  let holder: Holder | undefined
  let identity: Identity | undefined
  let keyring: Keyring | undefined
  let usage: UsageCounters | undefined
  let api: LocalApi | undefined
  let link: { readonly connection: Connection; readonly channel: Channel } | undefined
  /** Shards whose labels came on this connection. */
  const expected = new Set<string>()
  /** Messages that came before the connection counts as open. */
  let inbox: Uint8Array[] | null = null
  let fatal: string | null = null
  let problem: string | null = null
  let lastRefusal: string | null = null
  let transport: Transport | undefined
  let renewalId: Uint8Array | null = null
  /** Opening, and moving to newer keys: one at a time, and no key is installed meanwhile. */
  let unlocking: Promise<unknown> = Promise.resolve()
  const abort = new AbortController()
  const timers = new Map<TimerName | 'tpm', NodeJS.Timeout>()
  const statusListeners = new Set<(status: AgentStatus) => void>()
  const keyListeners = new Set<(change: KeyChange) => void>()
  const trustOfSettings = openTrust(settings.trust)
  const clock = openDeviceClock({
    wall: options.now,
    monotonic: options.monotonic ?? (() => performance.now()),
    born: Math.max(...trustOfSettings.roots.map(({ notBefore }) => notBefore)),
  })
  let trust = trustOfSettings
  /** What the server has told it to believe since, in the place of its configuration. */
  let bundle: TrustBundle | undefined

  const random = options.random
  const chance = (): number => Buffer.from(random(6)).readUIntBE(0, 6) / 2 ** 48
  const alive = (): void => {
    if (dead) throw new Killed('the agent was killed')
  }
  const step = (name: string): void => {
    alive()
    options.step(name)
    alive()
  }

  /** Nothing reaches the medium any more once the agent is dead. */
  const files: FileSystem = {
    read: async (...args) => (alive(), await options.files.read(...args)),
    write: async (...args) => (alive(), await options.files.write(...args)),
    rename: async (...args) => (alive(), await options.files.rename(...args)),
    remove: async (...args) => (alive(), await options.files.remove(...args)),
    syncFolder: async (...args) => (alive(), await options.files.syncFolder(...args)),
    makeFolder: async (...args) => (alive(), await options.files.makeFolder(...args)),
  }
  const document = (name: string): Document => openDocument({ files, folder: settings.data, name, step, onDamage: (why) => log(`not readable: ${why}`) })
  const trusted = trustStore(document('trust'), log)

  // --- status ---

  const status = (): AgentStatus => {
    const held = keyring?.held() ?? []
    const current = held.flatMap(({ key, current: epoch }) => (epoch === null ? [] : [[key, epoch] as const]))
    return {
      device: identity?.device ?? null,
      state: fatal !== null ? 'failed' : core.phase === 'starting' ? 'opening' : core.phase,
      connected: link !== undefined && core.session !== null,
      locked: isLocked(),
      holdings: held.flatMap(({ key, epochs }) => epochs.map(({ epoch, stage }) => ({ key, epoch, stage }))),
      current: Object.fromEntries(current),
      lastRefusal,
      problem: fatal ?? problem ?? (isLocked() ? (holder?.refusal ?? lockedWords) : null),
      tlsNotAfter: core.identity?.tlsNotAfter ?? null,
    }
  }
  const changed = (): void => {
    if (dead || statusListeners.size === 0) return
    const snapshot = status()
    for (const listener of statusListeners) listener(snapshot)
  }
  const tellKey = (change: KeyChange): void => {
    api?.notify(change)
    for (const listener of keyListeners) listener(change)
  }

  // --- events and effects ---

  const dispatch = (event: Event): void => {
    if (dead) return
    const [next, effects] = advance(core, event, { ...clock.belief(), uptime: clock.uptime(), random: chance })
    core = next
    for (const effect of effects) perform(effect)
    changed()
  }

  const perform = (effect: Effect): void => {
    switch (effect.do) {
      case 'log':
        return log(effect.line)
      case 'timer':
        return startTimer(effect.name, effect.after)
      case 'cancel':
        return cancelTimer(effect.name)
      case 'disconnect':
        return disconnect()
      case 'connect':
        return background('connect', connectDevice())
      case 'enrol':
        return background('enrol', enrolDevice(effect.purpose))
      case 'report':
        return background('report', report(effect.session, effect.sequence))
      case 'renew':
        return background('renew', renewIdentity(effect.session))
      case 'attest':
        return background('attest', attest(effect))
      case 'acknowledge':
        return background('acknowledge', acknowledge(effect.body))
      case 'install':
        return install(effect.delivery)
      case 'take':
        return work(effect.take.key, async (ring) => await take(ring, effect.take))
      case 'erase':
        return work(effect.key, async (ring) => await erase(ring, effect))
    }
  }

  /** What is done beside everything else; its failures are logged and show as a lost connection where they matter. */
  const background = (what: string, running: Promise<unknown>): void => {
    running.catch((thrown: unknown) => {
      if (!dead && !(thrown instanceof Killed)) log(`${what}: ${messageOf(thrown)}`)
    })
  }

  const startTimer = (name: TimerName | 'tpm', after: number, run: () => void = () => dispatch({ on: 'timer', name: name as TimerName })): void => {
    cancelTimer(name)
    timers.set(
      name,
      setTimeout(
        () => {
          timers.delete(name)
          run()
        },
        Math.min(Math.max(after, 0), 2 ** 31 - 1),
      ),
    )
  }
  const cancelTimer = (name: TimerName | 'tpm'): void => {
    clearTimeout(timers.get(name))
    timers.delete(name)
  }

  // --- keys: one piece of work at a time, as the core hands them out ---

  const work = (key: string, run: (ring: Keyring) => Promise<HeldKey | undefined>): void => {
    const ring = keyring
    // Not within the event that asked for it: the core is between two states there.
    const running = ring === undefined ? Promise.reject(new Error('no keyring')) : unlocking.then(async () => await run(ring))
    const failed = (thrown: unknown): void => {
      if (dead || thrown instanceof Killed) return
      if (thrown instanceof NotForThisPlace) return dispatch({ on: 'skipped', ask: thrown.ask })
      const reason = thrown instanceof Problem ? (thrown.reason ?? thrown.code) : thrown instanceof TpmError ? 'tpm' : 'internal'
      log(`${key}: ${messageOf(thrown)}`)
      if (isMediumError(thrown)) problem = `storage: ${messageOf(thrown)}`
      if (isTpmTrouble(thrown)) background('tpm', tellTrouble(thrown))
      dispatch({ on: 'failed', reason, transient: isTransient(thrown), held: ring?.heldOf(key) })
    }
    void running.then((held) => dispatch({ on: 'done', held }), failed)
  }

  const install = (delivery: Delivery): void => {
    const { key, wrapped } = delivery
    work(key, async (ring) => {
      const held = await ring.install(delivery)
      if (held === undefined && 'wraps' in wrapped) throw new NotForThisPlace(!ring.places().some((place) => isIn(wrapped, place)))
      return held
    })
  }

  /** What the TPM refused, in plain words; asking it why may take as long as it hangs. */
  const tellTrouble = async (thrown: unknown): Promise<void> => {
    const told = holder === undefined ? thrown : await holder.explained(thrown)
    problem = `TPM: ${messageOf(told).replace(/^TPM:? /, '')}`
    changed()
  }

  const consumers = openConsumers({ required: settings.consumers ?? [], within: settings.readyWithin ?? 10_000 })
  const outputs = openOutputs({ outputs: settings.outputs, files, step })

  /** Files, hooks, watchers and consumers first; `active` may be said only after that. */
  const take = async (ring: Keyring, of: Take): Promise<HeldKey> => {
    await ring.use(of)
    await giveOut(ring, of.key)
    tellKey({ key: of.key, epoch: of.epoch })
    await consumers.take(of.key, of.epoch, abort.signal)
    // A crash here: the consumers have it, and the next start gives it to them again.
    step('key.given')
    const held = await ring.settle(of.key, of.epoch)
    if (problem !== null && /^(?:storage|TPM):/.test(problem)) problem = null
    return held
  }

  const giveOut = async (ring: Keyring, key: string): Promise<void> => {
    const held = ring.heldOf(key)
    if (held === undefined || held.current === null) return
    const epochs = held.epochs
      .filter(({ epoch }) => epoch <= (held.current ?? 0))
      .map(({ epoch }) => ({ epoch, secret: held.protection === 'sealed' ? ring.material(key, epoch).secret : null }))
    await outputs.give({ key, algorithm: held.algorithm, current: held.current, epochs }, abort.signal)
  }

  /** Erased from the medium first; then no file of a consumer shows it any more; then it may be said. */
  const erase = async (ring: Keyring, of: { key: string; below: number | null; nonce: Uint8Array }): Promise<HeldKey | undefined> => {
    const held = await ring.erase(of.key, of.below, of.nonce)
    if (of.below === null) {
      await outputs.remove(of.key, abort.signal)
      tellKey({ key: of.key, epoch: null })
    } else await giveOut(ring, of.key)
    await usage?.keepOnly(ring.held().flatMap(({ key, epochs }) => epochs.map(({ epoch }) => ({ key, epoch }))))
    return held
  }

  // --- connection ---

  const common = { server: settings.server, tenant: settings.tenant, dial: options.dial, memory: openTlsMemory() }

  const disconnect = (): void => {
    const old = link
    link = undefined
    inbox = null
    if (old !== undefined) background('close', old.connection.close())
  }

  const open = async (of: Pick<ConnectionOptions, 'client' | 'credentials' | 'topics' | 'onMessage' | 'onClose'>): Promise<Connection> =>
    await (options.connect ?? openConnection)({ ...common, trust, time: clock.belief(), ...of }, abort.signal)

  const connectDevice = async (): Promise<void> => {
    if (holder === undefined || identity === undefined) return
    const { attester } = holder
    const { device, tls, tlsKey, chain } = identity
    const id = DeviceId.parse(device)
    expected.clear()
    inbox = []
    const early = inbox
    try {
      const connection: Connection = await open({
        client: device,
        credentials: { key: tlsKey.private, certificates: [tls, ...chain], sign: attester.sign },
        topics: {
          up: deviceTopic(id, 'up'),
          down: deviceTopic(id, 'down'),
          groups: keyring?.places().map(({ group, shard }) => groupTopic(group, shard)) ?? [],
        },
        onMessage: (payload) => {
          if (inbox === early && early.length < maxInbox) early.push(payload)
          else if (link?.connection === connection) receive(payload)
        },
        onClose: (why) => {
          if (link?.connection !== connection) return
          link = undefined
          log(`connection lost: ${why}`)
          dispatch({ on: 'offline', why: 'lost' })
        },
      })
      if (dead || core.phase !== 'connecting') return connection.destroy()
      const channel = openChannel({
        client: device,
        tenant: settings.tenant,
        signer: attester.signer,
        trust: () => trust,
        groups: () => new Set([...expected, ...(keyring?.places() ?? []).map(({ group, shard }) => groupAddress(group, shard))]),
        random,
        clock,
        transmit: connection.send,
      })
      link = { connection, channel }
      problem = null
      inbox = null
      dispatch({ on: 'online' })
      for (const payload of early) receive(payload)
    } catch (thrown) {
      inbox = null
      if (dead) return
      const refused = thrown instanceof ConnectionRefused
      problem = `${refused ? 'refused by the server' : 'no connection'}: ${messageOf(thrown)}`
      if (refused) lastRefusal = 'unauthenticated'
      log(problem)
      dispatch({ on: 'offline', why: !refused ? 'unreachable' : thrown.isOver ? 'over' : 'refused' })
    }
  }

  const receive = (payload: Uint8Array): void => {
    const current = link
    if (dead || current === undefined) return
    try {
      const message = current.channel.receive(payload)
      if (message !== undefined) handle(message)
    } catch (thrown) {
      // Not a message of our server, whoever sent it: it changes nothing.
      log(`message not accepted: ${thrown instanceof Problem ? `${thrown.code} ${thrown.message}` : messageOf(thrown)}`)
    }
  }

  const handle = ({ envelope, kid }: SignedMessage): void => {
    const { body } = envelope
    switch (body.type) {
      case 'welcome':
        return welcome(body)
      case 'delivery':
      case 'activate':
      case 'retire':
        return dispatch({ on: 'work', work: body })
      case 'broadcast':
        return broadcast(body, GroupAddress.parse(envelope.device))
      case 'labels':
        return background('labels', place(body))
      case 'attest':
        return dispatch({ on: 'attest', attest: body })
      case 'identity':
        return background('renew', acceptRenewal(body))
      case 'approvals':
        return background('approvals', learn(body))
      case 'trust':
        return background(
          'trust',
          inVault(async () => await believe(body, kid)),
        )
      case 'refusal':
        return refusal(body)
      default:
        log(`an unexpected ${body.type}`)
    }
  }

  /** What many can open, as a delivery to this one. */
  const broadcast = ({ generation, key, epoch, nonce, activate, wraps }: BodyOf<'broadcast'>, address: GroupAddress): void => {
    const wrapped = { protection: 'sealed' as const, ...partsOfAddress(address), generation, wraps }
    const sealed = { algorithm: 'A256GCM' as const, campaign: null, readOnly: false }
    dispatch({ on: 'work', work: { type: 'delivery', key, epoch, nonce, activate, ...sealed, wrapped } })
  }

  /** Where broadcasts of a group come for this device from now on; stored before anything that is sent after it is opened. */
  const place = async (labels: BodyOf<'labels'>): Promise<void> => {
    const [ring, current] = [keyring, link]
    if (ring === undefined || core.locked) return log(`locked: labels of ${labels.group} have to come again`)
    // What is opened with them may come before they are stored: it waits its turn behind them.
    if (labels.sealed !== null) expected.add(groupAddress(labels.group, labels.shard))
    await inVault(async () => await ring.place(labels))
    const topic = groupTopic(labels.group, labels.shard)
    if (labels.sealed !== null && current !== undefined) await current.connection.subscribe(topic)
  }

  const trustNow = (): Trust => (bundle === undefined ? trustOfSettings : openTrust(sourceOf(bundle)))

  /** Durable first, then in force, then said. */
  const believe = async (body: TrustBundle, kid: Uint8Array): Promise<void> => {
    const next = judgeBundle(body, { held: bundle, trust, kid, time: clock.belief() })
    if (next !== undefined) {
      await trusted.save(body)
      // A crash here: stored, and not said; the next report says it.
      step('trust.stored')
      bundle = body
      trust = identity === undefined ? next : next.with(identity)
      log(`trusts as bundle ${body.version} says`)
    }
    dispatch({ on: 'trusted', renewWithin: renewWithin() })
  }

  const renewWithin = (): number | null => (bundle !== undefined && identity !== undefined && isTainted(identity, bundle) ? bundle.renewWithin * 1_000 : null)

  const welcome = (body: BodyOf<'welcome'>): void => {
    const current = link
    const { session } = core
    if (current === undefined || (session !== null && body.time <= session.since)) return log('a welcome that is no news')
    try {
      checkServerTime(current.connection, body.time)
    } catch (thrown) {
      problem = messageOf(thrown)
      log(problem)
      return current.connection.destroy()
    }
    // Of two on one connection the second may be held back at will: it never sets the clock back.
    if (session === null || body.time > clock.belief().now) remember(clock.hear(body.time))
    dispatch({ on: 'welcome', session: body.session, time: body.time, reportEvery: body.reportEvery })
  }

  /** Makes the floor durable, from time to time. */
  const remember = (floor: number): void => {
    if (keyring !== undefined && floor - keyring.time > timeEvery) background('time', keyring.setTime(floor))
  }

  const refusal = (body: BodyOf<'refusal'>): void => {
    lastRefusal = body.code
    log(`refused by the server: ${body.code}`)
    const renewing = renewalId !== null && Buffer.compare(renewalId, body.re) === 0
    if (renewing) {
      renewalId = null
      // Where there is nothing to wait for it is the request itself that is not acceptable: the next one is new, with a new key.
      const isSpent = body.code !== 'unavailable' && body.code !== 'rate-limited' && body.retryAfter === null
      background(
        'renew',
        forgetRenewal(isSpent).then(() =>
          dispatch({ on: 'renew-failed', code: body.code, retryAfter: body.code === 'conflict' && isSpent ? 1 : body.retryAfter }),
        ),
      )
    } else dispatch({ on: 'refused', code: body.code, retryAfter: body.retryAfter })
  }

  const forgetRenewal = async (isSpent: boolean): Promise<void> => {
    if (isSpent) await holder?.vault.renewals.save(null)
  }

  const report = async (session: Uint8Array, sequence: number): Promise<void> => {
    const current = link
    if (current === undefined || keyring === undefined || holder === undefined) return
    const holdings = keyring
      .held()
      .filter(({ epochs }) => epochs.length > 0)
      .map(({ key, epochs }) => ({ key, epochs: epochs.map(({ epoch, stage }) => ({ epoch, stage })) }))
    const body = {
      type: 'report',
      session,
      sequence,
      holdings,
      usage: usage?.of(holdings.flatMap(({ key, epochs }) => epochs.map(({ epoch }) => ({ key, epoch })))).slice(0, 256) ?? [],
      places: [...keyring.places()],
      resetCount: await resetCountOf(holder),
      tlsNotAfter: core.identity?.tlsNotAfter ?? 0,
      trust: bundle === undefined ? null : { version: bundle.version, digest: trustDigest(bundle) },
      agent: agentVersion,
    }
    await current.channel.send(body as BodyOf<'report'>)
  }

  /** As it is now: a TPM that was reset under a running system is told, not hidden. */
  const resetCountOf = async (of: Holder): Promise<number> =>
    await of.attester.resetCount().catch((thrown: unknown) => {
      log(`resetCount: ${messageOf(thrown)}`)
      return of.resetCount
    })

  /** The state this device is in, proven to the server for this connection alone. */
  const attest = async (of: Extract<Effect, { do: 'attest' }>): Promise<void> => {
    const current = link
    try {
      if (current === undefined || holder === undefined || identity === undefined) throw new Error('the connection is gone')
      const { exporter } = current.connection
      const asked = {
        tenant: settings.tenant,
        device: identity.device,
        session: of.session,
        attest: of.attest,
        exporter,
        eventLog: await readEventLog(),
        measurements: readMeasurements,
      }
      if (of.attest.firmware !== null) {
        await recipientFor(of.attest.firmware)
        // What is at rest goes over before the server hears of the new recipient key: whatever it wraps to that key can be opened then. The server wraps nothing
        // to the one it knows from when it asks.
        await unlock(holder, null, identity)
      }
      await clockFor(holder.attester, lastRefusal === 'attestation-failed', of.attest.expires)
      if (holder.attester.evidence === undefined) throw new Error('this device has nothing that could quote its state')
      await current.channel.send(await holder.attester.evidence(asked))
      step('attested')
      dispatch({ on: 'attested', failed: null })
    } catch (thrown) {
      if (dead || thrown instanceof Killed) return
      dispatch({ on: 'attested', failed: messageOf(thrown) })
    }
  }

  /** Signed statement of a stage; `active` carries the proof of use, made with the key itself. */
  const acknowledge = async (said: Omit<BodyOf<'acknowledge'>, 'proof' | 'type'>): Promise<void> => {
    const current = link
    // Nobody listens: the next report shows it and the server asks again.
    if (current === undefined || keyring === undefined) return
    const proof = said.stage === 'active' ? await keyring.proof(said.key, said.epoch, said.nonce) : null
    await current.channel.send({ type: 'acknowledge', ...said, proof })
    step(`acknowledged.${said.stage}`)
  }

  /**
   * Before a quote that the server would refuse for its clock: a first one, which nothing recorded explains, and one after a refusal. Waits for the clock, and
   * spends no attempt meanwhile. `until`: a quote is wanted by then, milliseconds since 1970.
   */
  const clockFor = async ({ clock: tpmClock }: Attester, strict: boolean, until: number | null = null): Promise<void> => {
    if (tpmClock === undefined || !strict) return
    const before = problem
    const first = await tpmClock()
    if (first.safe) return
    if (until !== null && clock.belief().now + first.safeWithin >= until) throw new Error(`${unsafeClockText(first)}; asked again then`)
    const safe = await safeClock({
      read: tpmClock,
      pause: async (milliseconds) => await pause(milliseconds, undefined, { signal: abort.signal }),
      tell(words) {
        if (problem !== words) log(words)
        problem = words
        changed()
      },
    })
    log(safe ? 'the TPM calls its clock safe' : 'the TPM still calls its clock unsafe: the server decides')
    problem = before
    changed()
  }

  // --- keys under firmware ---

  /** Only keys that the server's release key approves: a policy of somebody else's making would be somebody else's to satisfy. */
  const recipientFor = async (policy: FirmwarePolicy): Promise<KeyBlob> => {
    if (holder === undefined) throw new Problem('unavailable', 'the TPM is not open')
    trust.signerOf(keyId(spkiOf(policy.signer)), ['release'], clock.belief())
    const mine = holder
    return await inVault(async () => await mine.recipientFor(policy))
  }

  const inVault = async <R>(work: () => Promise<R>): Promise<R> => {
    const mine = unlocking.then(work)
    unlocking = mine.catch(() => undefined)
    return await mine
  }

  /** There are keys, or an identity, that the firmware which runs is not approved for. */
  const isLocked = (): boolean => holder !== undefined && (holder.vault.isLocked || (identity !== undefined && !holder.vault.isOpen))

  /** Remembers what is approved, and opens with it what it opens. `who`: whose keys these are; null while nobody knows. */
  const unlock = async (of: Holder, set: ApprovalSet | null, who: Identity | null): Promise<void> =>
    await inVault(async () => {
      if (set !== null) await of.learn(set)
      const outcome = await of.vault.refresh()
      if (!of.vault.isOpen || who === null) return
      const fresh = keyring === undefined
      const ring = keyring ?? (await of.vault.keyring(who.device))
      // It was in memory only. At rest before anything is given out: what the server has replaced would not let it in after a power cut.
      if (fresh && who === identity) await keep(of, who)
      await of.vault.settle(who, ring)
      keyring = ring
      if (outcome === 'moved') log('the keys of this device are bound to the newest approvals')
      if (!fresh || !core.locked) return
      log('unlocked: the running firmware is approved')
      dispatch({ on: 'unlocked', held: ring.held(), owed: ring.owed() })
    })

  const learn = async ({ signer, ref, approvals }: BodyOf<'approvals'>): Promise<void> => {
    if (holder !== undefined) await unlock(holder, { signer, ref, approvals }, identity ?? null)
    changed()
  }

  // --- identity ---

  const enrolDevice = async (purpose: 'enrol' | 'return'): Promise<void> => {
    if (holder === undefined) return
    try {
      await clockFor(holder.attester, holder.device === null || lastRefusal === 'attestation-failed')
      alive()
      const result = await enrol({
        connect: open,
        attester: holder.attester,
        trust,
        tenant: settings.tenant,
        serial: settings.serial,
        purpose,
        known: identity?.device ?? holder.device,
        agent: agentVersion,
        eventLog: readEventLog,
        random,
        clock,
        step,
      })
      const floor = clock.hear(result.time)
      await unlock(holder, result.approvals, result.identity)
      await adopt(holder, result.identity)
      await enrolled(holder)
      await keyring?.setTime(floor)
      if (!holder.vault.isOpen) log(`${lockedWords}; its identity is in memory only`)
      // A crash here: enrolled and stored; the next start connects with the new certificate.
      step('enrol.stored')
      lastRefusal = null
      problem = null
      dispatch({ on: 'enrolled', identity: factsOf(result.identity), locked: !holder.vault.isOpen })
    } catch (thrown) {
      if (dead || thrown instanceof Killed) return
      const refused = thrown instanceof Refused ? thrown : undefined
      if (refused !== undefined) lastRefusal = refused.code
      problem = `enrolment: ${messageOf(thrown)}`
      log(problem)
      dispatch({ on: 'enrol-failed', code: refused?.code ?? null, retryAfter: refused?.retryAfter ?? null })
    }
  }

  const readEventLog = async (): Promise<Uint8Array> => {
    if (options.readEventLog !== undefined) return await options.readEventLog()
    if (settings.eventLog === null) return new Uint8Array(0)
    const found = await files.read(settings.eventLog)
    if (found === undefined) log(`no event log at ${settings.eventLog}; set "eventLog": null if this machine has none`)
    return found ?? new Uint8Array(0)
  }

  /** What a message holds of the kernel's list from this entry on; null, and why in the log, when there is nothing to be had. */
  const readMeasurements = async (from: number): Promise<ImaPart | null> => {
    const path = settings.imaList ?? null
    if (options.readImaList === undefined && path === null) return null
    try {
      return await imaPart(options.readImaList?.() ?? piecesOf(path ?? ''), from, imaLimits.wire.maxBytes)
    } catch (thrown) {
      log(`the server asks for the list of measured files: ${messageOf(thrown)}`)
      return null
    }
  }

  /** What brought this device in is needed no more. Whatever hinders it, the identity is there. */
  const enrolled = async (of: Holder): Promise<void> =>
    await of.attester.enrolled?.().catch((thrown: unknown) => {
      if (!dead && !(thrown instanceof Killed)) log(`what was needed once to enrol is still there: ${messageOf(thrown)}`)
    })

  /** Puts an identity at rest; while that cannot be done, it is said there that another one has taken its place. */
  const keep = async (of: Holder, who: Identity): Promise<void> => {
    if (!of.vault.isOpen) await of.replaced(true)
    await of.vault.identities.save(who)
    if (of.vault.isOpen) await of.replaced(false)
  }

  /** Durable first, then in force. */
  const adopt = async (of: Holder, next: Identity): Promise<void> => {
    await keep(of, next)
    step('identity.stored')
    identity = next
    trust = trustNow().with(next)
  }

  const renewIdentity = async (session: Uint8Array): Promise<void> => {
    if (holder === undefined || identity === undefined || link === undefined) return
    const { vault, attester } = holder
    try {
      const { pending, body } = await prepareRenewal({
        store: vault.renewals,
        identity,
        tenant: settings.tenant,
        session,
        sign: attester.sign,
        random,
        now: clock.now(),
        step,
      })
      renewalId = pending.id
      await link.channel.send(body, pending.id)
    } catch (thrown) {
      if (!dead) dispatch({ on: 'renew-failed' })
      throw thrown
    }
  }

  const acceptRenewal = async (message: BodyOf<'identity'>): Promise<void> => {
    if (holder === undefined || identity === undefined) return
    const pending = await holder.vault.renewals.load()
    if (pending === undefined || pending === null || Buffer.compare(pending.id, message.re) !== 0) return log('an identity that was not asked for')
    const next = renewedIdentity({ identity, pending, message, trust })
    await adopt(holder, next)
    // A crash here: both certificates are there and valid; the new one is stored and used.
    await holder.vault.renewals.save(null)
    renewalId = null
    step('renew.stored')
    dispatch({ on: 'renewed', identity: factsOf(next) })
  }

  // --- start ---

  const openHolder = async (): Promise<Holder> => {
    await files.makeFolder(settings.data, 0o700)
    const common = { settings, files, document, random, step, log }
    const { openTpm } = options
    if (settings.tpm === null) return await openSoftwareHolder({ ...common, element: options.secureElement })
    if (openTpm === undefined) throw new Error('nothing opens the TPM')
    const raw = reopening(openTpm, await openTpm())
    transport = raw
    const gated: Transport = {
      get managed() {
        return raw.managed ?? false
      },
      send: async (command) => (alive(), await raw.send(command)),
      close: async () => await raw.close(),
    }
    return await openTpmHolder({ ...common, transport: gated, recipientFor })
  }

  const start = async (): Promise<void> => {
    try {
      if (api === undefined && settings.socket !== null) {
        await files.makeFolder(dirname(settings.socket.path), 0o755)
        const opened = await openLocalApi({ ...settings.socket, keys: served, consumers, status })
        if (dead) return opened.destroy()
        api = opened
      }
    } catch (thrown) {
      if (dead) return
      fatal = messageOf(thrown)
      log(`cannot start: ${fatal}`)
      return changed()
    }
    try {
      holder = await openHolder()
      usage = await openUsage({ document: document('usage'), step, onLoss: (why) => log(`counters of use are lost: ${why}`) })
      const { vault, known, isReplaced } = holder
      bundle = await trusted.load()
      trust = trustNow()
      identity = await vault.identities.load()
      if (identity !== undefined) {
        trust = trust.with(identity)
        keyring = await vault.keyring(identity.device)
        await vault.settle(identity, keyring)
        await enrolled(holder)
        clock.restore(keyring.time)
      }
      problem = null
      if (vault.isLocked) log(lockedWords)
      dispatch({
        on: 'start',
        identity: identity === undefined ? null : factsOf(identity),
        known,
        locked: vault.isLocked,
        replaced: isReplaced,
        held: keyring?.held() ?? [],
        owed: keyring?.owed() ?? [],
      })
      // What it was told and had not begun when it ended.
      if (renewWithin() !== null) dispatch({ on: 'trusted', renewWithin: renewWithin() })
    } catch (thrown) {
      if (dead || thrown instanceof Killed) return
      problem = messageOf(thrown)
      log(`not ready, trying again in ${tpmRetry / 1000} s: ${problem}`)
      await transport?.close().catch(() => undefined)
      transport = undefined
      startTimer('tpm', tpmRetry, () => void start())
      changed()
    }
  }

  const opened = <P>(part: P | undefined): P => {
    alive()
    if (part === undefined) throw new Problem('unavailable', status().problem ?? 'this device has no identity yet', { reason: 'agent.not-ready' })
    return part
  }
  const served = localKeys({ keyring: () => opened(keyring), usage: () => opened(usage), random })

  const kill = (): void => {
    if (dead) return
    dead = true
    abort.abort()
    for (const timer of timers.values()) clearTimeout(timer)
    timers.clear()
    link?.connection.destroy()
    link = undefined
    api?.destroy()
    keyring?.close()
    holder?.destroy()
    void transport?.close().catch(() => undefined)
  }

  const stop = async (): Promise<void> => {
    if (dead) return
    const connection = link?.connection
    link = undefined
    dispatch({ on: 'stop' })
    for (const timer of timers.values()) clearTimeout(timer)
    timers.clear()
    await connection?.close()
    abort.abort()
    await api?.close()
    // Waits for what is being written, then frees the TPM for the next process.
    await keyring?.setTime(0)
    await usage?.settle().catch((thrown: unknown) => log(`counters of use: ${messageOf(thrown)}`))
    const freed = holder?.close().catch((thrown: unknown) => log(`closing the TPM: ${messageOf(thrown)}`))
    // A TPM that hangs is left as it is: the next start frees what is loaded.
    await Promise.race([freed, new Promise((resolve) => setTimeout(resolve, tpmFarewell).unref())])
    kill()
  }

  void start()

  return {
    ...served,
    status,
    onChange(listener) {
      statusListeners.add(listener)
      return () => void statusListeners.delete(listener)
    },
    onKey(listener) {
      keyListeners.add(listener)
      return () => void keyListeners.delete(listener)
    },
    stop,
    kill,
  }
}
