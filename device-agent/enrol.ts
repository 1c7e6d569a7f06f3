import { enrolmentTopic } from '@fleetkey/protocol/topics.ts'
import { EnrolmentId } from '@fleetkey/protocol/ids.ts'
import type { ApprovalSet, Body, BodyOf } from '@fleetkey/protocol/messages.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import type { SignedMessage } from '@fleetkey/protocol/signed.ts'
import { sha256 } from '@fleetkey/protocol/transcript.ts'
import type { Attester } from './attesters/attester.ts'
import { openChannel, type Channel } from './channel.ts'
import { checkServerTime, type Connection, type ConnectionOptions } from './connection.ts'
import type { DeviceClock } from './device-clock.ts'
import type { Identity } from './identity.ts'
import { newTlsKey, tlsCsr, type TlsKey } from './tls-key.ts'
import { keyId } from '@fleetkey/protocol/signed.ts'
import type { Trust } from './trust.ts'

/** The server said no: its public code, and how many seconds to wait if it said so. */
export class Refused extends Error {
  override readonly name = 'Refused'
  readonly code: BodyOf<'refusal'>['code']
  readonly retryAfter: number | null

  constructor({ code, retryAfter }: BodyOf<'refusal'>) {
    super(`refused by the server: ${code}`)
    this.code = code
    this.retryAfter = retryAfter
  }
}

export interface EnrolOptions {
  readonly connect: (of: Pick<ConnectionOptions, 'client' | 'credentials' | 'topics' | 'onMessage' | 'onClose'>) => Promise<Connection>
  readonly attester: Attester
  readonly trust: Trust
  readonly tenant: string
  readonly serial: string
  readonly purpose: 'enrol' | 'return'
  /** Device id of an earlier enrolment: it never changes. */
  readonly known: string | null
  /** Name and version of this program. */
  readonly agent: string
  readonly eventLog: () => Promise<Uint8Array>
  readonly random: (length: number) => Uint8Array
  readonly clock: DeviceClock
  readonly step: (name: string) => void
}

/** Milliseconds for one answer of the server. */
const patience = 60_000
/** What an answer may carry besides the event log, and what the server takes before identity. */
const maxEventLog = (1 << 20) - (64 << 10)

const same = (a: Uint8Array, b: Uint8Array): boolean => Buffer.compare(a, b) === 0

/**
 * Enrols in two round trips over a connection of its own: hello and challenge, answer and identity. The device computes the nonce itself, over the
 * exporter of its own TLS connection. `time`: the server's signed time; `approvals`: what firmware the recipient key works under. Throws Refused, or whatever
 * else went wrong; nothing is stored here.
 */
export const enrol = async (of: EnrolOptions): Promise<{ readonly identity: Identity; readonly approvals: ApprovalSet | null; readonly time: number }> => {
  const client = EnrolmentId.parse(`e-${Buffer.from(of.random(16)).toString('hex')}`)
  const mailbox = openMailbox()
  const connection = await of.connect({
    client,
    credentials: null,
    topics: { up: enrolmentTopic(client, 'up'), down: enrolmentTopic(client, 'down') },
    onMessage: mailbox.put,
    onClose: (why) => mailbox.fail(new Error(why)),
  })
  try {
    const channel = openChannel({ ...of, client, signer: of.attester.signer, trust: () => of.trust, transmit: connection.send })
    return await converse(of, connection, channel, mailbox)
  } finally {
    mailbox.fail(new Error('the enrolment is over'))
    await connection.close()
  }
}

const converse = async (of: EnrolOptions, connection: Connection, channel: Channel, mailbox: Mailbox) => {
  const hello = await of.attester.hello({ serial: of.serial, purpose: of.purpose, random: of.random(32), agent: of.agent })
  const eventLog = await of.eventLog()
  if (eventLog.length > maxEventLog) throw new Problem('unsupported', `an event log of ${eventLog.length} bytes`, { reason: 'event-log.size' })
  const helloId = of.random(16)
  const helloBytes = await channel.send(hello, helloId)
  of.step('enrol.hello')
  const challengeMessage = await mailbox.next(channel, helloId, (body) => body.type === 'challenge' && same(body.hello, sha256(helloBytes)))
  const challenge = bodyOf(challengeMessage, 'challenge')
  // Signed over our own randomness: no clock of this device has a say in whether the certificate of this TLS session is over.
  checkServerTime(connection, challenge.expires)
  const tlsKey = newTlsKey()
  const answer = await of.attester.answer({
    tenant: of.tenant,
    hello,
    helloBytes,
    challenge,
    challengeBytes: challengeMessage.bytes,
    exporter: connection.exporter,
    eventLog,
    tls: { spki: tlsKey.spki, csr: await tlsCsr(tlsKey, of.serial) },
  })
  const answerId = of.random(16)
  await channel.send(answer, answerId)
  // A crash here: the server may have enrolled the device; it says hello again and gets certificates for the same identity.
  of.step('enrol.answered')
  const identity = bodyOf(await mailbox.next(channel, answerId, (body) => body.type === 'identity' && same(body.re, answerId)), 'identity')
  return { identity: accepted(of, identity, tlsKey), approvals: identity.approvals, time: identity.time }
}

const bodyOf = <T extends Body['type']>(message: SignedMessage, type: T): BodyOf<T> => {
  const { body } = message.envelope
  if (body.type !== type) throw new Problem('malformed', `${body.type} where ${type} was expected`)
  return body as BodyOf<T>
}

/** The identity counts only if its certificates are for our own keys, for one device, and lead to our root. */
const accepted = (of: EnrolOptions, body: BodyOf<'identity'>, tlsKey: TlsKey): Identity => {
  // Judged when it was signed: the server's certificates are for the server's time, whatever this device's clocks show.
  const at = body.time
  if (of.known !== null && of.known !== body.device)
    throw new Problem('forbidden', `this is ${of.known}, not ${body.device}`, { reason: 'identity.other-device' })
  if (body.ldevid === null) throw new Problem('malformed', 'an enrolment without LDevID certificate', { reason: 'identity.no-ldevid' })
  const ldevid = of.trust.check(body.ldevid, body.chain, at)
  if (!same(keyId(ldevid.spki), of.attester.signer.kid))
    throw new Problem('forbidden', 'an LDevID certificate for another key', { reason: 'identity.ldevid-key' })
  checkTls(of.trust, body, tlsKey, at)
  return { device: body.device, ldevid: body.ldevid, tls: body.tls, tlsKey, chain: body.chain, keys: body.keys }
}

/** Throws Problem unless the TLS certificate of an identity message is for this key and device and leads to our root at that time. */
export const checkTls = (trust: Trust, body: BodyOf<'identity'>, tlsKey: TlsKey, at: number): void => {
  const tls = trust.check(body.tls, body.chain, at)
  if (!same(tls.spki, tlsKey.spki)) throw new Problem('forbidden', 'a TLS certificate for another key', { reason: 'identity.tls-key' })
  if (tls.commonName !== body.device) throw new Problem('forbidden', `a TLS certificate for ${tls.commonName ?? 'nobody'}`, { reason: 'identity.tls-name' })
}

interface Mailbox {
  put(bytes: Uint8Array): void
  fail(error: Error): void
  /** The next verified message that is the one; throws Refused when the server refuses the request `id`. Others are passed over. */
  next(channel: Channel, id: Uint8Array, wanted: (body: Body) => boolean): Promise<SignedMessage>
}

const maxWaiting = 64

const openMailbox = (): Mailbox => {
  const waiting: Uint8Array[] = []
  let failure: Error | undefined
  let wake: (() => void) | undefined

  const take = async (until: number): Promise<Uint8Array> => {
    for (;;) {
      const bytes = waiting.shift()
      if (bytes !== undefined) return bytes
      if (failure !== undefined) throw failure
      const left = until - performance.now()
      if (left <= 0) throw new Error(`no answer from the server within ${patience / 1000} s`)
      await new Promise<void>((resolve) => {
        const timer = setTimeout(resolve, left)
        wake = () => {
          clearTimeout(timer)
          resolve()
        }
      })
      wake = undefined
    }
  }

  return {
    put(bytes) {
      if (waiting.length < maxWaiting) waiting.push(bytes)
      wake?.()
    },
    fail(error) {
      failure ??= error
      wake?.()
    },
    async next(channel, id, wanted) {
      const until = performance.now() + patience
      for (;;) {
        const bytes = await take(until)
        let message: SignedMessage | undefined
        try {
          message = channel.receive(bytes)
        } catch (thrown) {
          // Whatever does not verify is not from the server: passing it over leaves a hostile broker nothing but delay.
          if (!(thrown instanceof Problem)) throw thrown
          continue
        }
        if (message === undefined) continue
        const { body } = message.envelope
        if (body.type === 'refusal' && same(body.re, id)) throw new Refused(body)
        if (wanted(body)) return message
      }
    },
  }
}
