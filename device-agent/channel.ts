import { chunkFrameMax, isFrame, reassembler, split } from '@fleetkey/protocol/chunks.ts'
import { DeviceId, EnrolmentId, TenantId } from '@fleetkey/protocol/ids.ts'
import type { Body } from '@fleetkey/protocol/messages.ts'
import { signMessage, type SignedMessage, type Signer } from '@fleetkey/protocol/signed.ts'
import type { DeviceClock } from './device-clock.ts'
import { readFromServer, type Trust } from './trust.ts'

/** Signed messages over one connection, whatever their size. */
export interface Channel {
  /** Signs and sends; the bytes as signed. `id`: that of an earlier request when it is repeated. */
  send(body: Body, id?: Uint8Array): Promise<Uint8Array>
  /** The verified message that these bytes are, or complete; undefined while frames are missing. Throws Problem for everything else. */
  receive(bytes: Uint8Array): SignedMessage | undefined
}

const maxFromServer = 4 << 20
const maxWhole = 48 << 10

/** `client`: client id of the connection; `transmit` publishes one payload. */
export const openChannel = (of: {
  readonly client: string
  readonly tenant: string
  readonly signer: Signer
  readonly trust: () => Trust
  /** Addresses of the shards whose broadcasts are for this device. */
  readonly groups?: () => ReadonlySet<string>
  readonly random: (length: number) => Uint8Array
  readonly clock: DeviceClock
  readonly transmit: (bytes: Uint8Array) => Promise<void>
}): Channel => {
  const transfer = reassembler({ max: maxFromServer })
  const tenant = TenantId.parse(of.tenant)
  const device = of.client.startsWith('e-') ? EnrolmentId.parse(of.client) : DeviceId.parse(of.client)
  let sequence = 0
  let turn: Promise<unknown> = Promise.resolve()

  const sign = async (body: Body, id: Uint8Array): Promise<Uint8Array> => {
    sequence = Math.max(sequence + 1, of.clock.now())
    return await signMessage({ v: 1, tenant, device, from: 'device', id, seq: sequence, body }, of.signer)
  }

  const transmitWhole = async (bytes: Uint8Array): Promise<void> => {
    if (bytes.length <= maxWhole) return await of.transmit(bytes)
    const { manifest, frames } = split(bytes, of.random(16))
    await of.transmit(await sign(manifest, of.random(16)))
    for (const frame of frames) await of.transmit(frame)
  }

  const read = (bytes: Uint8Array, max: number): SignedMessage =>
    readFromServer(bytes, { trust: of.trust(), tenant: of.tenant, client: of.client, groups: of.groups?.() ?? new Set(), time: of.clock.belief(), max })

  return {
    async send(body, id = of.random(16)) {
      const bytes = await sign(body, id)
      // The frames of one message are not mixed with another's.
      const mine = turn.then(async () => await transmitWhole(bytes))
      turn = mine.catch(() => undefined)
      await mine
      return bytes
    },
    receive(bytes) {
      if (isFrame(bytes)) {
        const whole = transfer.add(bytes)
        return whole === undefined ? undefined : read(whole, maxFromServer)
      }
      const message = read(bytes, chunkFrameMax)
      if (message.envelope.body.type !== 'manifest') return message
      transfer.begin(message.envelope.body)
      return undefined
    },
  }
}
