import { DeviceId, EnrolmentId } from '@fleetkey/protocol/ids.ts'
import { deviceTopic, enrolmentTopic } from '@fleetkey/protocol/topics.ts'
import type { Aedes } from 'aedes'
import type { BrokerLimits } from './limits.ts'
import type { Peer } from './peer.ts'

type ConnectPacket = Parameters<Aedes['preConnect']>[1]
type PublishPacket = Parameters<Aedes['authorizePublish']>[1]
type Subscription = Parameters<Aedes['authorizeSubscribe']>[1]
type Client = ReturnType<Aedes['handle']>

/** The topics of a client id; `undefined` for an id that is neither a device's nor an enrolment's. */
export const topicsOf = (client: string): { readonly up: string; readonly down: string } | undefined => {
  const enrolment = EnrolmentId.safeParse(client)
  if (enrolment.success) return { up: enrolmentTopic(enrolment.data, 'up'), down: enrolmentTopic(enrolment.data, 'down') }
  const device = DeviceId.safeParse(client)
  return device.success ? { up: deviceTopic(device.data, 'up'), down: deviceTopic(device.data, 'down') } : undefined
}

/** What is wrong with a CONNECT before anybody asks who it is. The session is made clean: a stored one would keep filters that were refused. */
export const judgeConnect = (packet: ConnectPacket, limits: BrokerLimits): Peer['refusal'] => {
  packet.clean = true
  // The library keeps the packet as long as the connection lasts, and a view would keep the 64 KB that it was read with.
  if (packet.password instanceof Uint8Array) packet.password = Buffer.from(new Uint8Array(packet.password).buffer)
  const { clientId, keepalive = 0 } = packet
  if (topicsOf(clientId) === undefined) return { returnCode: 2, why: 'client id' }
  if (packet.protocolVersion === 3) return { returnCode: 5, why: 'MQTT 3.1; 3.1.1 is needed' }
  if (packet.will !== undefined) return { returnCode: 5, why: 'a will' }
  if (keepalive === 0 || keepalive > limits.keepAlive) return { returnCode: 5, why: `keep-alive ${keepalive}` }
  return undefined
}

/** Why this message may not be published; `undefined` if it may. */
export const judgePublish = (peer: Peer, packet: PublishPacket): string | undefined => {
  if (peer.ref === undefined) return 'a message before CONNACK'
  if (packet.topic !== peer.up) return 'a message to a topic that is not its own'
  if (packet.qos === 2) return 'QoS 2'
  return packet.retain ? 'a retained message' : undefined
}

/** Exact names only, from a fixed list: its own `down`, and the group topics it was given. */
export const judgeSubscribe = (peer: Peer, filter: string): boolean => peer.ref !== undefined && (filter === peer.down || peer.groups.has(filter))

/** Judged again for every packet that leaves: what the library has stored or matched decides nothing. */
export const judgeForward = (peer: Peer, topic: string): boolean => peer.ref !== undefined && peer.subscribed.has(topic)

/**
 * Fails a packet on its declared length, before its bytes are gathered: the library has no limit, and gathers 100 MB of a CONNECT. It reaches for
 * the length step of the parser inside the library's client; a version in which that step is missing does not start.
 */
export const limitPackets = (client: Client, max: () => number): void => {
  const parser = (client as unknown as { readonly _parser?: Parser })._parser
  const parseLength = parser?._parseLength
  if (parser === undefined || typeof parseLength !== 'function') throw new Error('the MQTT library has another parser: its packets cannot be limited')
  parser._parseLength = function () {
    if (!parseLength.call(parser)) return false
    return parser.packet.length <= max() || parser._emitError(new Error('a packet too large'))
  }
}

interface Parser {
  readonly packet: { readonly length: number }
  _parseLength: () => boolean
  _emitError(error: Error): boolean
}

export type { Client, PublishPacket, Subscription }
