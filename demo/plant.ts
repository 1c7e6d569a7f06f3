// The plant's own MQTT broker, which Fleetkey is not part of: plain TCP, no rights, sees whatever devices exchange.
import { createServer, type AddressInfo } from 'node:net'
import { Aedes } from 'aedes'
import { connectAsync } from 'mqtt'

export interface Plant {
  readonly port: number
  /** Every payload that passed. */
  readonly seen: readonly Buffer[]
  /** Sends one message from one client to another through the broker; what arrived. */
  carry(payload: Buffer): Promise<Buffer>
  stop(): Promise<void>
}

/** Starts the plant's broker on loopback. */
export const startPlant = async (): Promise<Plant> => {
  const broker = await Aedes.createBroker()
  const seen: Buffer[] = []
  broker.on('publish', (packet, client) => {
    if (client !== null) seen.push(Buffer.from(packet.payload))
  })
  const server = createServer(broker.handle)
  await new Promise<void>((resolve) => void server.listen(0, '127.0.0.1', resolve))
  const { port } = server.address() as AddressInfo
  return {
    port,
    seen,
    async carry(payload) {
      const [sender, receiver] = await Promise.all([connectAsync({ port, host: '127.0.0.1' }), connectAsync({ port, host: '127.0.0.1' })])
      await receiver.subscribeAsync('plant/line-1', { qos: 1 })
      const arrived = new Promise<Buffer>((resolve) => void receiver.once('message', (_, message) => resolve(message)))
      await sender.publishAsync('plant/line-1', payload, { qos: 1 })
      const message = await arrived
      await Promise.all([sender.endAsync(), receiver.endAsync()])
      return message
    },
    async stop() {
      await new Promise<void>((resolve) => broker.close(() => resolve()))
      await new Promise<void>((resolve) => void server.close(() => resolve()))
    },
  }
}
