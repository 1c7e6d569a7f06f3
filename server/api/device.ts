import { chunkFrameMax, isFrame, reassembler } from '@fleetkey/protocol/chunks.ts'
import type { DeviceId } from '@fleetkey/protocol/ids.ts'
import { messagesFromDevice, type Body, type BodyOf } from '@fleetkey/protocol/messages.ts'
import { Problem, toProblem } from '@fleetkey/protocol/problem.ts'
import { readMessage, verifyMessage, type SignedMessage } from '@fleetkey/protocol/signed.ts'
import { methodOf } from '../attestation/methods.ts'
import { hasIdentity, isMeasured, type IdentifiedDevice } from '../fleet/device.ts'
import { acknowledge } from '../flows/acknowledge.ts'
import { sendApprovals } from '../flows/approvals.ts'
import { hearReport, takeEvidence } from '../flows/attest.ts'
import type { Context, DeviceRef } from '../flows/context.ts'
import { callerOf, finishEnrolment, startEnrolment, type EnrolServices } from '../flows/enrol.ts'
import { followDevice } from '../flows/group-query.ts'
import { messageTo } from '../flows/message.ts'
import { refuse } from '../flows/perform.ts'
import { renew, renewalAgain } from '../flows/renew.ts'
import { reportUsage } from '../flows/report-usage.ts'

export interface DeviceServices extends EnrolServices {
  /** Seconds between reports of a device that stays connected. */
  readonly reportEvery: number
}

const limits = {
  /** One MQTT payload: a frame of 48 KiB and what is around it. */
  payload: 64 << 10,
  beforeIdentity: 1 << 20,
  afterIdentity: 4 << 20,
  /** Unfinished transfers of all connections without identity. */
  allTransfers: 64 << 20,
  /** A transfer that nobody continues gives its place up to others after this many milliseconds. */
  transferLife: 60_000,
  /** Messages of one connection that wait for their turn. */
  waiting: 32,
  /** Refusals after which a connection is closed. */
  refusals: { identified: 64, unidentified: 8 },
} as const

/** What the server remembers of one connection; gone when it closes. */
interface Session {
  readonly from: DeviceRef
  /** The nonce that reports and renewals of this connection must carry. */
  readonly nonce: Uint8Array
  readonly transfer: ReturnType<typeof reassembler>
  reserved: number
  transferSince: number
  /** Bytes received before identity. */
  received: number
  /** Highest report sequence; a replayed report is refused. */
  sequence: number
  /** LDevID key of the hello on this connection: what its answer must be signed with. */
  presentedSpki: Uint8Array | null
  refusals: number
  waiting: number
  turn: Promise<void>
}

const identified = ['report', 'acknowledge', 'evidence', 'renew'] as const satisfies readonly Body['type'][]

const same = (a: Uint8Array, b: Uint8Array): boolean => Buffer.compare(a, b) === 0

/**
 * Takes every message of every device: bounds, reassembly, parse, sender, signature, session, then the flow of its type.
 * The promise resolves when the effect is durable. A refusal is answered with its public code, audited, and does not reject.
 * Memory per connection is bounded (`limits`); messages of one connection are handled one after the other.
 */
export const deviceHandler = (ctx: Context, services: DeviceServices): ((from: DeviceRef, bytes: Uint8Array) => Promise<void>) => {
  const sessions = new Map<number, Session>()
  let reserved = 0

  const release = (session: Session): void => {
    session.transfer.reset()
    reserved -= session.reserved
    session.reserved = 0
  }

  const sessionOf = (from: DeviceRef): Session => {
    const known = sessions.get(from.connection)
    if (known !== undefined) return known
    const session: Session = {
      from,
      nonce: ctx.random(16),
      transfer: reassembler({ max: from.device === null ? limits.beforeIdentity : limits.afterIdentity }),
      reserved: 0,
      transferSince: 0,
      received: 0,
      sequence: -1,
      presentedSpki: null,
      refusals: 0,
      waiting: 0,
      turn: Promise.resolve(),
    }
    sessions.set(from.connection, session)
    return session
  }

  const signerFor = (from: DeviceRef) => (from.device === null ? ctx.authority.roles.challenge : ctx.authority.roles.delivery)

  const answer = async (from: DeviceRef, bytes: Uint8Array): Promise<void> => void (await ctx.bus.send(from.client, bytes))

  const welcome = async ({ from, nonce }: Session, device: DeviceId): Promise<void> => {
    const body: Body = { type: 'welcome', session: nonce, time: ctx.now(), reportEvery: services.reportEvery }
    const bytes = await messageTo(ctx, ctx.authority.roles.delivery, from.client, body)
    // Signed meanwhile, and the device has come back: its new connection has a welcome of its own, and must not take this one for it.
    if (ctx.sessions.of(device)?.from.connection === from.connection) await answer(from, bytes)
  }

  /** What every connection of a device begins with. Approvals are there before its first report is answered: it may need them to open its keys. */
  const greet = async (session: Session, id: DeviceId): Promise<void> => {
    await welcome(session, id)
    const device = await ctx.store.get('device', id)
    if (!hasIdentity(device)) return
    const renewed = await renewalAgain(ctx, session.from, device)
    if (renewed !== undefined) await answer(session.from, renewed)
    if (isMeasured(device)) await sendApprovals(ctx, device.id, device.model)
  }

  /** Tells the peer the public code, audits the reason, and closes the connection of a peer that earns too many. */
  const refused = async (session: Session, message: SignedMessage | undefined, thrown: unknown): Promise<void> => {
    const { from } = session
    const problem = toProblem(thrown)
    if (problem.code === 'internal') ctx.log(`message of ${from.client}: ${problem.message.slice(0, 2000)}`)
    const type = message?.envelope.body.type ?? 'unreadable'
    try {
      await refuse(ctx, { caller: callerOf(from), action: 'device.message', subject: `${from.client} ${type}` }, problem)
    } catch (unwritable) {
      ctx.log(`refusal of ${from.client} not audited: ${toProblem(unwritable).message.slice(0, 200)}`)
    }
    const retryAfter = problem.retryAfterSeconds ?? (problem.code === 'unavailable' ? 5 : null)
    const re = message?.envelope.id ?? new Uint8Array(16)
    await answer(from, await messageTo(ctx, signerFor(from), from.client, { type: 'refusal', re, code: problem.code, retryAfter }))
    session.refusals++
    if (session.refusals >= (from.device === null ? limits.refusals.unidentified : limits.refusals.identified))
      await ctx.bus.kick(from.client, 'too many refusals')
  }

  const begin = (session: Session, manifest: BodyOf<'manifest'>): void => {
    const max = session.from.device === null ? limits.beforeIdentity : limits.afterIdentity
    if (manifest.length > max) throw new Problem('malformed', `a transfer of ${manifest.length} bytes`, { reason: 'transfer.size' })
    release(session)
    if (session.from.device === null) {
      if (reserved + manifest.length > limits.allTransfers)
        for (const other of sessions.values()) if (other.reserved > 0 && other.transferSince + limits.transferLife < ctx.now()) release(other)
      if (reserved + manifest.length > limits.allTransfers)
        throw new Problem('rate-limited', 'too many transfers without identity', { reason: 'transfer.memory', retryAfterSeconds: 5 })
      session.reserved = manifest.length
      reserved += manifest.length
    }
    session.transferSince = ctx.now()
    session.transfer.begin(manifest)
  }

  /** The key that this message must be signed with, and the record it belongs to. */
  const verified = async (session: Session, message: SignedMessage): Promise<IdentifiedDevice | null> => {
    const { body } = message.envelope
    if (body.type === 'hello') {
      const spki = methodOf(body.presented).ldevidSpki(body)
      verifyMessage(message, spki)
      session.presentedSpki = spki
      return null
    }
    if (session.presentedSpki !== null && (body.type === 'answer' || session.from.device === null)) {
      verifyMessage(message, session.presentedSpki)
      return null
    }
    if (session.from.device === null) throw new Problem('unauthenticated', `${body.type} before a hello`, { reason: 'message.no-hello' })
    const device = await ctx.store.get('device', session.from.device)
    if (!hasIdentity(device)) throw new Problem('forbidden', `device ${session.from.device} is not enrolled`, { reason: 'device.not-enrolled' })
    verifyMessage(message, device.keys.ldevidSpki)
    return device
  }

  const needDevice = (device: IdentifiedDevice | null): DeviceId => {
    if (device === null) throw new Problem('forbidden', 'a message for devices with an identity', { reason: 'message.no-identity' })
    return device.id
  }

  const ofSession = (session: Session, nonce: Uint8Array): void => {
    if (!same(session.nonce, nonce)) throw new Problem('conflict', 'the nonce of another session', { reason: 'session.nonce' })
  }

  /** One row per type that a device may send. */
  const dispatch = async (session: Session, message: SignedMessage, device: IdentifiedDevice | null): Promise<void> => {
    const { from } = session
    const { body } = message.envelope
    switch (body.type) {
      case 'hello':
        return await answer(from, await startEnrolment(ctx, services, from, message))
      case 'answer':
        return await answer(from, await finishEnrolment(ctx, services, from, message))
      case 'manifest':
        return begin(session, body)
      case 'report': {
        ofSession(session, body.session)
        if (body.sequence <= session.sequence) throw new Problem('conflict', `report ${body.sequence} after ${session.sequence}`, { reason: 'report.replayed' })
        const isFirst = session.sequence < 0
        session.sequence = body.sequence
        await hearReport(ctx, needDevice(device), body)
        for (const used of body.usage) await reportUsage(ctx, needDevice(device), used)
        // What it is may have changed since it was here: it enrolled, or was tagged while the server was cut short.
        if (isFirst) await followDevice(ctx, needDevice(device))
        return
      }
      case 'acknowledge':
        return await acknowledge(ctx, needDevice(device), body)
      case 'evidence':
        await takeEvidence(ctx, from, needDevice(device), body)
        return await followDevice(ctx, needDevice(device))
      case 'renew':
        ofSession(session, body.session)
        return await answer(from, await renew(ctx, from, message))
      default:
        throw new Problem('unsupported', `${body.type} comes from servers`, { reason: 'message.direction' })
    }
  }

  const addressed = (session: Session, message: SignedMessage): void => {
    const { envelope } = message
    const types: readonly string[] = messagesFromDevice
    if (envelope.from !== 'device' || !types.includes(envelope.body.type))
      throw new Problem('unsupported', `${envelope.body.type} comes from servers`, { reason: 'message.direction' })
    if (envelope.tenant !== ctx.tenant) throw new Problem('forbidden', `tenant ${envelope.tenant}`, { reason: 'message.tenant' })
    if (envelope.device !== session.from.client)
      throw new Problem('forbidden', `${session.from.client} sent a message of ${envelope.device}`, { reason: 'message.device' })
    if (session.from.device === null && (identified as readonly string[]).includes(envelope.body.type))
      throw new Problem('forbidden', `${envelope.body.type} without identity`, { reason: 'message.no-identity' })
  }

  const take = async (session: Session, bytes: Uint8Array, max: number): Promise<void> => {
    let message: SignedMessage | undefined
    try {
      message = readMessage(bytes, { max })
      addressed(session, message)
      await dispatch(session, message, await verified(session, message))
    } catch (thrown) {
      await refused(session, message, thrown)
    }
  }

  const receive = async (session: Session, bytes: Uint8Array): Promise<void> => {
    if (!isFrame(bytes)) return await take(session, bytes, chunkFrameMax)
    let whole: Uint8Array | undefined
    try {
      whole = session.transfer.add(bytes)
    } catch (thrown) {
      release(session)
      return await refused(session, undefined, thrown)
    }
    if (whole === undefined) return
    release(session)
    await take(session, whole, session.from.device === null ? limits.beforeIdentity : limits.afterIdentity)
  }

  const admit = (session: Session, bytes: Uint8Array): void => {
    if (bytes.length > limits.payload) throw new Problem('malformed', `a payload of ${bytes.length} bytes`, { reason: 'message.size' })
    if (session.waiting >= limits.waiting) throw new Problem('rate-limited', 'too many messages at once', { reason: 'message.rate', retryAfterSeconds: 1 })
    if (session.from.device !== null) return
    session.received += bytes.length
    if (session.received > limits.beforeIdentity) throw new Problem('rate-limited', 'more than 1 MiB before identity', { reason: 'message.volume' })
  }

  ctx.bus.onPresence((from, present) => {
    if (!present) {
      const session = sessions.get(from.connection)
      if (session !== undefined) release(session)
      sessions.delete(from.connection)
      ctx.sessions.close(from)
      return
    }
    const session = sessionOf(from)
    const { device } = from
    if (device === null) return
    ctx.sessions.open(from, session.nonce)
    session.turn = session.turn
      .then(() => greet(session, device))
      .catch((thrown: unknown) => ctx.log(`welcome to ${from.client}: ${toProblem(thrown).message}`))
  })

  return async (from, bytes) => {
    const session = sessionOf(from)
    try {
      admit(session, bytes)
    } catch (thrown) {
      return await refused(session, undefined, thrown)
    }
    session.waiting++
    const turn = session.turn.then(() => receive(session, bytes)).finally(() => session.waiting--)
    // A failure belongs to this message alone: the next one still has its turn.
    session.turn = turn.catch(() => undefined)
    await turn
  }
}
