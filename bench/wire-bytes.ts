import { createECDH, generateKeyPairSync, sign } from 'node:crypto'
import { DeviceId, Epoch, KeyId, TenantId } from '@fleetkey/protocol/ids.ts'
import type { Body } from '@fleetkey/protocol/messages.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { signMessage } from '@fleetkey/protocol/signed.ts'
import { sealTo } from '@fleetkey/protocol/wrap.ts'
import { around } from './around.ts'

/** Bytes of one signed message as it is published, with names of usual length. */
const bytesOf = async (from: 'server' | 'device', body: Body): Promise<number> => {
  const { privateKey } = generateKeyPairSync('ec', { namedCurve: 'prime256v1' })
  const envelope = { v: 1, tenant: TenantId.parse('default'), device, from, id: around.random(16), seq: around.now(), body } as const
  const signer = { kid: around.random(8), sign: async (tbs: Uint8Array) => new Uint8Array(sign('sha256', tbs, { key: privateKey, dsaEncoding: 'ieee-p1363' })) }
  return (await signMessage(envelope, signer)).length
}

const device = DeviceId.parse('gateway-batch-1-000001')

/** What one device's part in one rotation of a sealed key puts on the wire, bytes: to the device and from it, each message once. */
export const measureWireBytes = async (): Promise<{ readonly delivery: number; readonly down: number; readonly up: number }> => {
  const [key, epoch, campaign, nonce] = [KeyId.parse('telemetry'), Epoch.parse(7), 'mcampaig-00000000', around.random(16)]
  const point = new Uint8Array(createECDH('prime256v1').generateKeys())
  const context = { tenant: 'default', device, key, epoch, protection: 'sealed', purpose: 'key' } as const
  const sealed = sealTo(point, new Secret(around.random(32)), context)
  const common = { key, epoch, campaign, nonce }
  const delivery = await bytesOf('server', {
    type: 'delivery',
    ...common,
    algorithm: 'A256GCM',
    activate: false,
    readOnly: false,
    wrapped: { protection: 'sealed', sealed },
  })
  const activate = await bytesOf('server', { type: 'activate', ...common })
  const retire = await bytesOf('server', { type: 'retire', key, below: epoch, campaign, nonce })
  const said = async (stage: 'installed' | 'active' | 'retired'): Promise<number> =>
    await bytesOf('device', { type: 'acknowledge', ...common, stage, proof: stage === 'active' ? around.random(32) : null, reason: null })
  return { delivery, down: delivery + activate + retire, up: (await said('installed')) + (await said('active')) + (await said('retired')) }
}
