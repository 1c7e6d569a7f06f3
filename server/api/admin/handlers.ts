import { once } from 'node:events'
import { DeviceId, GroupId, KeyId } from '@fleetkey/protocol/ids.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { DeviceState, type Bundle, type ResponseOf } from '@fleetkey/protocol/admin.ts'
import { toPem } from '@fleetkey/protocol/x509/pem.ts'
import { z } from 'zod'
import { authorise } from '../../access/authorise.ts'
import type { Caller } from '../../access/caller.ts'
import type { SequencedEntry } from '../../audit/entry.ts'
import { exportFooter, exportHeader, exportLine } from '../../audit/export.ts'
import { checkpointText, signedCheckpoint } from '../../audit/checkpoint.ts'
import { orderAttestation } from '../../flows/attest.ts'
import { orderBatch, previewBatchOrder, type BatchOrder } from '../../flows/batch-order.ts'
import { blastRadius } from '../../flows/blast-radius.ts'
import { raisedAlerts } from '../../flows/alerts.ts'
import { calendar } from '../../flows/calendar.ts'
import type { Context, Seal, Table, Tables } from '../../flows/context.ts'
import type { Around } from '../../flows/doctor/check.ts'
import { examine } from '../../flows/doctor/examine.ts'
import { createKey, grantKey } from '../../flows/create-key.ts'
import { endorsementPolicy, importEndorsement, removeEndorsement, setEndorsementPolicy } from '../../flows/endorsement.ts'
import { createTokens, revokeToken } from '../../flows/enrolment-token.ts'
import { parseQuery } from '../../fleet/query.ts'
import { followBatch, setGroupQuery, tagDevice } from '../../flows/group-query.ts'
import { addMembers, createGroup, previewPolicy, removeMember, setGroupPolicy } from '../../flows/group.ts'
import { exposedKeys } from '../../flows/exposed-keys.ts'
import { heldAt } from '../../flows/held.ts'
import { setTopics } from '../../flows/key-topics.ts'
import { keyReaders, topicReaders } from '../../flows/readers.ts'
import { unprovenDevices } from '../../flows/unproven.ts'
import { setClaimWindow } from '../../flows/claim-window.ts'
import { importBatch } from '../../flows/import-batch.ts'
import { findCertificate, searchCertificates } from '../../flows/inventory.ts'
import { addOperator, removeOperator } from '../../flows/operator.ts'
import { caStatus } from '../../flows/ca-status.ts'
import { caNamed, revokeCa } from '../../flows/revoke-ca.ts'
import { caBlastRadius } from '../../flows/under-ca.ts'
import { activateCa, distributeCa, prepareCa, retireCa, taintCa } from '../../flows/rollover.ts'
import { approvals, grantApproval } from '../../flows/second-person.ts'
import { importRelease } from '../../flows/import-release.ts'
import { perform } from '../../flows/perform.ts'
import { keksOf, retireKek, rotateKek, type KekOutcome } from '../../flows/kek.ts'
import { rewrapAll } from '../../flows/rewrap.ts'
import { allowRecovery } from '../../flows/recover.ts'
import { revokeDevice } from '../../flows/revoke.ts'
import { behindStages, needCampaign } from '../../flows/campaign.ts'
import { advanceCampaign, approveCampaign, confirmCut, controlCampaign, retryCampaign, rollBack } from '../../flows/campaign-order.ts'
import { mayBeCut } from '../../flows/cut.ts'
import { setKeyPolicy } from '../../flows/key-policy.ts'
import { rotateCompromised, startRotation } from '../../flows/rotate.ts'
import { confirmSeal, splitSeal } from '../../flows/seal.ts'
import { batchRadius, stationRadius } from '../../flows/shared-radius.ts'
import { addStation, reinstateStation, removeStation, revokeStation, signedBy, suspendStation } from '../../flows/station.ts'
import { certifyStation } from '../../flows/station-certificate.ts'
import { reinstateCa, suspendCa } from '../../flows/suspend-ca.ts'
import { previewDeviceOrder, reinstateDevice, suspendDevice } from '../../flows/suspend.ts'
import { previewWithdrawal, withdrawRelease } from '../../flows/withdraw-release.ts'
import { placeOf, wholeCampaign } from '../../campaigns/campaign.ts'
import type { Deadline } from '../../ca/alerts.ts'
import type { Station } from '../../fleet/device.ts'
import type { AlertService } from '../alerts.ts'
import type { Handlers, Streams } from './router.ts'
import { sealHandlers, sealView } from './seal.ts'
import {
  alertView,
  approvalView,
  auditView,
  batchRow,
  blastRadiusView,
  caBlastRadiusView,
  calendarView,
  campaignView,
  certificateSummary,
  certificateView,
  deviceSummary,
  deviceView,
  effectView,
  endorsementView,
  groupView,
  impactView,
  keyView,
  pageOf,
  policyView,
  releaseView,
  sharedRadiusView,
  signedView,
  stationCertificateView,
  stationView,
  targetView,
  tokenView,
  webhookView,
} from './views.ts'

export interface ServerFacts {
  readonly version: string
  readonly store: string
  readonly kms: string
  readonly seal: Seal
  readonly bundle: () => Bundle
  readonly certificates: () => { name: string; notAfter: number }[]
  /** What the server itself rests on, and until when. */
  readonly deadlines: () => Promise<readonly Deadline[]>
  readonly alerts: AlertService
  /** What the checks of the doctor see beside the store and the keys. */
  readonly around: Around
  /** Key that signs checkpoints, and the log's name. */
  readonly log: { readonly origin: string; readonly key: string; readonly spki: Uint8Array }
}

/** `issuing-2` is the CA with the key `issuing-ca-2`. */
const issuerKey = (name: string): string => name.replace(/^(root|issuing)/, '$1-ca')
const bytes = (text: string): Uint8Array => new Uint8Array(Buffer.from(text, 'base64'))
const done = { ok: true } as const

const parsed = <T>(schema: { safeParse(value: unknown): { success: true; data: T } | { success: false } }, value: string, what: string): T => {
  const result = schema.safeParse(value)
  if (!result.success) throw new Problem('malformed', `${what} ${JSON.stringify(value.slice(0, 80))}`)
  return result.data
}
const deviceId = (value: string): DeviceId => parsed(DeviceId, value, 'device')
const groupId = (value: string): GroupId => parsed(GroupId, value, 'group')
const keyId = (value: string): KeyId => parsed(KeyId, value, 'key')
const order = (value: string): BatchOrder => parsed(z.enum(['revoke', 'suspend', 'reinstate']), value, 'order')

const need = async <T extends Table>(ctx: Context, table: T, id: string): Promise<Tables[T]> => {
  const row = await ctx.store.get(table, id)
  if (row === undefined) throw new Problem('not-found', `no ${table} ${id}`)
  return row
}

const kekView = ({ former, ...rest }: KekOutcome) => ({ ...rest, former: [...former] })

/** What each operation of protocol/admin.ts does: reads here, writes through flows. */
export const adminHandlers = (ctx: Context, facts: ServerFacts): Handlers => {
  const read = (caller: Caller): void => authorise(caller, 'fleet.read')
  const page = (query: { after?: string | undefined; limit: number }): { limit: number; after?: string } => ({
    limit: query.limit,
    ...(query.after === undefined ? {} : { after: query.after }),
  })
  const signed = (body: { content: string; signature: string; station: string }) => ({
    content: bytes(body.content),
    signature: bytes(body.signature),
    station: body.station,
  })
  const viewOf = async (station: Station) => {
    const certificate = station.certificate === undefined ? undefined : await ctx.store.get('certificate', station.certificate)
    return stationView(station, certificate, ctx.now())
  }
  const states = async (batch?: string): Promise<ResponseOf<'status'>['devices']> => {
    const count = async (state: string): Promise<number> => await ctx.store.count('device', { state, ...(batch === undefined ? {} : { batch }) })
    const counts = await Promise.all(DeviceState.options.map(async (state) => [state, await count(state)] as const))
    return Object.fromEntries(counts) as ResponseOf<'status'>['devices']
  }
  return {
    async status({ caller }) {
      read(caller)
      const [devices, head, endorsements] = await Promise.all([states(), ctx.store.checkpoint(), ctx.store.find('endorsement', { limit: 1000 })])
      return {
        tenant: ctx.tenant,
        version: facts.version,
        now: ctx.now(),
        ...ctx.store.health(),
        connections: ctx.bus.health().connections,
        testEndorsements: endorsements.filter(({ test }) => test).map(({ subject }) => subject),
        devices,
        audit: { size: head.size, root: Buffer.from(head.root).toString('hex') },
        certificates: facts.certificates(),
        store: facts.store,
        kms: facts.kms,
      }
    },
    async doctor({ caller }) {
      read(caller)
      return { findings: [...(await examine(ctx, facts.around))] }
    },
    async bundle({ caller }) {
      read(caller)
      return facts.bundle()
    },

    async 'station.list'({ caller }) {
      read(caller)
      const stations = await ctx.store.find('station', { limit: 1000 })
      return { items: await Promise.all(stations.map(async (station) => await viewOf(station))), next: null }
    },
    async 'station.show'({ caller, params }) {
      read(caller)
      return await viewOf(await need(ctx, 'station', params.id))
    },
    async 'station.certify'({ caller, params, body }) {
      const { id, der, ...dates } = await certifyStation(ctx, caller, { id: params.id, csr: bytes(body.csr), devices: body.devices })
      const chain = ctx.authority.chainOf(der).map((one) => toPem('CERTIFICATE', one))
      return { serial: id, ...dates, pem: toPem('CERTIFICATE', der), chain: chain.join('') }
    },
    async 'station.add'({ caller, body }) {
      await addStation(ctx, caller, body)
      return done
    },
    async 'station.remove'({ caller, params }) {
      await removeStation(ctx, caller, params.id)
      return done
    },
    async 'station.signed'({ caller, params }) {
      read(caller)
      return signedView(await signedBy(ctx, params.id))
    },
    async 'station.blast-radius'({ caller, params, query }) {
      read(caller)
      const { certificates, ...radius } = await stationRadius(ctx, params.id, page(query))
      return { ...sharedRadiusView(radius), certificates: certificates.map((one) => stationCertificateView(one, ctx.now())) }
    },
    async 'station.revoke'({ caller, params, body }) {
      const { already, ...signed } = await revokeStation(ctx, caller, params.id, body.reason, body.code)
      return { already, ...signedView(signed) }
    },

    async 'station.suspend'({ caller, params, body }) {
      const { already, ...signed } = await suspendStation(ctx, caller, params.id, body.reason)
      return { already, ...signedView(signed) }
    },
    'station.reinstate': async ({ caller, params }) => await reinstateStation(ctx, caller, params.id),

    async 'batch.import'({ caller, body }) {
      const imported = await importBatch(ctx, caller, { ...signed(body), format: body.format, batch: body.batch, claimUntil: body.claimUntil })
      await followBatch(ctx, imported.batch)
      return imported
    },
    async 'batch.list'({ caller, query }) {
      read(caller)
      return await pageOf(ctx, 'batch', page(query), batchRow)
    },
    async 'batch.show'({ caller, params }) {
      read(caller)
      return { ...batchRow(await need(ctx, 'batch', params.id)), states: await states(params.id) }
    },
    'batch.window': async ({ caller, params, body }) => batchRow(await setClaimWindow(ctx, caller, params.id, body.claimUntil)),
    async 'batch.preview'({ caller, params }) {
      read(caller)
      return effectView(await previewBatchOrder(ctx, params.id, order(params.order)))
    },
    async 'batch.blast-radius'({ caller, params, query }) {
      read(caller)
      return sharedRadiusView(await batchRadius(ctx, params.id, page(query)))
    },
    'batch.revoke': async ({ caller, params, body }) =>
      effectView(await orderBatch(ctx, caller, params.id, { order: 'revoke', why: body.reason, code: body.code })),
    'batch.suspend': async ({ caller, params, body }) => effectView(await orderBatch(ctx, caller, params.id, { order: 'suspend', why: body.reason })),
    'batch.reinstate': async ({ caller, params }) => effectView(await orderBatch(ctx, caller, params.id, { order: 'reinstate', why: 'reinstated' })),

    async 'ca.status'({ caller }) {
      read(caller)
      return await caStatus(ctx)
    },
    async 'certificate.list'({ caller, query }) {
      read(caller)
      const { expiresFrom, expiresBefore, issuer, ...rest } = query
      const named = issuer === undefined ? undefined : issuerKey(issuer)
      const { certificates, next } = await searchCertificates(ctx, { ...rest, issuer: named, from: expiresFrom, until: expiresBefore })
      return { items: certificates.map((one) => certificateSummary(one, ctx.now())), next }
    },
    async 'certificate.show'({ caller, params }) {
      read(caller)
      return certificateView(await findCertificate(ctx, params.id), ctx.now())
    },
    async 'certificate.calendar'({ caller, query }) {
      read(caller)
      const spans = await calendar(ctx, { ...query, issuer: query.issuer === undefined ? undefined : issuerKey(query.issuer) })
      return calendarView(spans, await facts.deadlines())
    },
    async 'alert.list'({ caller }) {
      read(caller)
      const health = facts.alerts.health()
      return { items: (await raisedAlerts(ctx)).slice(-1000).map(alertView), webhook: health === null ? null : webhookView(health) }
    },
    async 'alert.test'({ caller }) {
      await perform(ctx, { caller, action: 'alert.test', subject: 'webhook' }, () => undefined)
      const error = await facts.alerts.test()
      if (error === undefined) throw new Problem('conflict', 'no webhook is configured (alerts.webhook of --config)')
      return { taken: error === null, error }
    },
    'ca.prepare': async ({ caller, body }) => await prepareCa(ctx, caller, body),
    'ca.distribute': async ({ caller }) => await distributeCa(ctx, caller),
    'ca.activate': async ({ caller, body }) => await activateCa(ctx, caller, body.force),
    'ca.taint': async ({ caller, body }) => await taintCa(ctx, caller, { number: body.generation, within: body.within }),
    'ca.retire': async ({ caller, body }) => await retireCa(ctx, caller, { number: body.generation, force: body.force }),
    async 'kms.status'({ caller }) {
      read(caller)
      const { current, former } = await keksOf(ctx)
      return {
        backend: facts.kms,
        kek: current,
        former: [...former],
        keys: (await ctx.kms.list()).map(({ name, purpose, place, uses }) => ({ name, purpose, place, uses })),
      }
    },
    'kms.rotate-kek': async ({ caller }) => kekView(await rotateKek(ctx, caller, rewrapAll)),
    'kms.retire-kek': async ({ caller }) => kekView(await retireKek(ctx, caller, rewrapAll)),
    async 'ca.blast-radius'({ caller, params, query }) {
      read(caller)
      return caBlastRadiusView(await caBlastRadius(ctx, await caNamed(ctx, params.name), page(query)))
    },
    async 'ca.revoke'({ caller, params, body: { reason, code, force } }) {
      const { keys, campaigns, ...outcome } = await revokeCa(ctx, caller, params.name, { why: reason, code, force })
      return { ...outcome, keys: [...keys], campaigns: [...campaigns] }
    },
    'ca.suspend': async ({ caller, params, body }) => await suspendCa(ctx, caller, params.name, body.reason),
    'ca.reinstate': async ({ caller, params }) => await reinstateCa(ctx, caller, params.name),
    ...sealHandlers(ctx, facts.seal),
    async 'seal.split'({ caller, body }) {
      const { shares, threshold, only, reason } = body
      const split = await splitSeal(ctx, facts.seal, { caller, order: { shares, threshold, only }, reason, recipient: bytes(body.recipient) })
      return { ...split, shares: split.shares.map((share) => Buffer.from(share).toString('base64')) }
    },
    'seal.confirm': async ({ caller, params }) => sealView(await confirmSeal(ctx, facts.seal, caller, params.id)),
    async 'approval.list'({ caller }) {
      read(caller)
      return { items: (await approvals(ctx)).map((one) => approvalView(one, ctx.now())) }
    },
    'approval.grant': async ({ caller, params }) => approvalView(await grantApproval(ctx, caller, params.id), ctx.now()),
    async 'operator.list'({ caller }) {
      read(caller)
      const items = (await ctx.store.find('token', { limit: 1000 })).map(({ operator, roles, createdAt, expiresAt }) => ({
        id: operator,
        roles: [...roles],
        createdAt,
        expiresAt,
      }))
      return { items, next: null }
    },
    async 'operator.remove'({ caller, params }) {
      await removeOperator(ctx, caller, params.id)
      return done
    },
    'operator.add': async ({ caller, body }) => ({ id: body.id, token: await addOperator(ctx, caller, body) }),
    'release.import': async ({ caller, body }) => await importRelease(ctx, caller, signed(body)),
    async 'release.list'({ caller, query }) {
      read(caller)
      return await pageOf(ctx, 'release', page(query), releaseView)
    },
    async 'release.preview'({ caller, params }) {
      read(caller)
      return impactView(await previewWithdrawal(ctx, `${params.model}/${params.name}`))
    },
    'release.withdraw': async ({ caller, params, body }) => impactView(await withdrawRelease(ctx, caller, `${params.model}/${params.name}`, body.reason)),
    'endorsement.import': async ({ caller, body }) => await importEndorsement(ctx, caller, body),
    async 'endorsement.list'({ caller, query }) {
      read(caller)
      return await pageOf(ctx, 'endorsement', page(query), endorsementView)
    },
    async 'endorsement.remove'({ caller, params, query }) {
      if (query.dryRun === 'true') read(caller)
      return await removeEndorsement(ctx, caller, params.id, { dryRun: query.dryRun === 'true' })
    },
    async 'endorsement.policy.get'({ caller }) {
      read(caller)
      return await endorsementPolicy(ctx)
    },
    async 'endorsement.policy.set'({ caller, body }) {
      const change = Object.fromEntries(Object.entries(body).filter(([, value]) => value !== undefined))
      return await setEndorsementPolicy(ctx, caller, change)
    },

    async 'token.create'({ caller, body }) {
      const { validFor, ...order } = body
      const tokens = await createTokens(ctx, caller, { ...order, life: validFor })
      return {
        tokens: tokens.map(({ id, text, expiresAt }) => {
          const token = Buffer.from(text.bytes()).toString('latin1')
          text.destroy()
          return { id, token, expiresAt }
        }),
      }
    },
    async 'token.list'({ caller, query }) {
      read(caller)
      const where = query.batch === undefined ? {} : { where: { batch: query.batch } }
      return await pageOf(ctx, 'enrolmentToken', { ...page(query), ...where }, (row) => tokenView(row, ctx.now()))
    },
    async 'token.revoke'({ caller, params }) {
      await revokeToken(ctx, caller, params.id)
      return done
    },

    async 'group.create'({ caller, body }) {
      if (body.query !== undefined) parseQuery(body.query)
      await createGroup(ctx, caller, body.id)
      if (body.query !== undefined) await setGroupQuery(ctx, caller, body.id, body.query)
      return done
    },
    async 'group.query'({ caller, params, body }) {
      await setGroupQuery(ctx, caller, groupId(params.id), body.query)
      return await groupView(ctx, await need(ctx, 'group', params.id))
    },
    async 'group.list'({ caller, query }) {
      read(caller)
      return await pageOf(ctx, 'group', page(query), async (row) => await groupView(ctx, row))
    },
    async 'group.show'({ caller, params }) {
      read(caller)
      return await groupView(ctx, await need(ctx, 'group', params.id))
    },
    async 'group.members'({ caller, params, query }) {
      read(caller)
      await need(ctx, 'group', params.id)
      return await pageOf(ctx, 'member', { ...page(query), where: { group: params.id } }, ({ device, joinedAt }) => ({ device, joinedAt }))
    },
    'group.add': async ({ caller, params, body }) => await addMembers(ctx, caller, groupId(params.id), body),
    async 'group.remove'({ caller, params }) {
      await removeMember(ctx, caller, groupId(params.id), deviceId(params.device))
      return done
    },
    async 'group.policy.get'({ caller, params }) {
      read(caller)
      return policyView(await need(ctx, 'group', params.id))
    },
    async 'group.policy.set'({ caller, params, body }) {
      return policyView(await setGroupPolicy(ctx, caller, groupId(params.id), body))
    },
    async 'group.policy.preview'({ caller, params, body }) {
      read(caller)
      return impactView(await previewPolicy(ctx, groupId(params.id), body))
    },

    async 'device.list'({ caller, query }) {
      read(caller)
      const where = { ...(query.state === undefined ? {} : { state: query.state }), ...(query.batch === undefined ? {} : { batch: query.batch }) }
      return await pageOf(ctx, 'device', { ...page(query), where }, (row) => deviceSummary(ctx, row))
    },
    async 'device.show'({ caller, params }) {
      read(caller)
      return await deviceView(ctx, await need(ctx, 'device', params.id))
    },
    async 'device.recover'({ caller, params, body }) {
      return await allowRecovery(ctx, caller, deviceId(params.id), body.reason)
    },
    async 'device.preview'({ caller, params }) {
      read(caller)
      return effectView(await previewDeviceOrder(ctx, deviceId(params.id), order(params.order)))
    },
    'device.revoke': async ({ caller, params, body }) => effectView(await revokeDevice(ctx, caller, deviceId(params.id), body.reason, body.code)),
    'device.suspend': async ({ caller, params, body }) => effectView(await suspendDevice(ctx, caller, deviceId(params.id), body.reason)),
    'device.reinstate': async ({ caller, params }) => await reinstateDevice(ctx, caller, deviceId(params.id)),
    async 'device.blast-radius'({ caller, params }) {
      read(caller)
      return blastRadiusView(await blastRadius(ctx, deviceId(params.id)))
    },

    async 'device.held'({ caller, params, query }) {
      read(caller)
      const { items, groups, granted, ...rest } = await heldAt(ctx, deviceId(params.id), query.at ?? ctx.now(), page(query))
      return { ...rest, items: [...items], groups: [...groups], granted: [...granted] }
    },
    async 'revocation.preview'({ caller, params }) {
      read(caller)
      const what = parsed(z.enum(['device', 'batch', 'station', 'ca']), params.what, 'what is revoked:')
      if (what === 'device') deviceId(params.id)
      const { keys, groups, devices } = await exposedKeys(ctx, what, params.id)
      return { keys: [...keys], groups: [...groups], devices }
    },

    'device.tag': async ({ caller, params, body }) => ({ tags: { ...(await tagDevice(ctx, caller, deviceId(params.id), body.tags)) } }),
    'device.attest': async ({ caller, params }) => ({ asked: await orderAttestation(ctx, caller, deviceId(params.id)) }),

    'key.create': async ({ caller, body }) => await createKey(ctx, caller, body),
    async 'key.list'({ caller, query }) {
      read(caller)
      return await pageOf(ctx, 'key', page(query), async (row) => await keyView(ctx, row))
    },
    async 'key.show'({ caller, params }) {
      read(caller)
      return await keyView(ctx, await need(ctx, 'key', params.id))
    },
    'key.grant': async ({ caller, params, body }) => await grantKey(ctx, caller, keyId(params.id), body.group, body.history),
    async 'key.topics'({ caller, params, body }) {
      await setTopics(ctx, caller, keyId(params.id), body.topics)
      return await keyView(ctx, await need(ctx, 'key', params.id))
    },
    async 'key.unproven'({ caller, params, query }) {
      read(caller)
      return await unprovenDevices(ctx, keyId(params.id), { ...page(query), epoch: query.epoch })
    },
    async 'key.readers'({ caller, params, query }) {
      read(caller)
      return await keyReaders(ctx, keyId(params.id), { from: query.from, until: query.until ?? ctx.now() }, page(query))
    },
    async 'topic.readers'({ caller, query }) {
      read(caller)
      return await topicReaders(ctx, query.topic, { from: query.from, until: query.until ?? ctx.now() }, page(query))
    },
    async 'key.rotate'({ caller, params, body }) {
      const { mayCut, ...policy } = body
      return await startRotation(ctx, caller, keyId(params.id), { policy, because: 'ordered by an operator', ...(mayCut === undefined ? {} : { mayCut }) })
    },
    'key.compromised': async ({ caller, params, body }) => await rotateCompromised(ctx, caller, keyId(params.id), `compromised: ${body.reason}`),
    'key.policy.set': async ({ caller, params, body }) => await keyView(ctx, await setKeyPolicy(ctx, caller, keyId(params.id), body)),

    async 'campaign.create'({ caller, body }) {
      const { key, ...policy } = body
      return await startRotation(ctx, caller, key, { policy, because: 'ordered by an operator', epoch: 'current' })
    },
    async 'campaign.preview'({ caller, params, query }) {
      read(caller)
      const { items, ...counts } = await mayBeCut(ctx, keyId(params.id), query)
      return { ...counts, items: [...items] }
    },
    async 'campaign.list'({ caller, query }) {
      read(caller)
      const where = query.key === undefined ? {} : { where: { key: query.key } }
      return await pageOf(ctx, 'campaign', { ...page(query), ...where }, async (row) => await campaignView(ctx, wholeCampaign(row)))
    },
    async 'campaign.show'({ caller, params }) {
      read(caller)
      return await campaignView(ctx, await needCampaign(ctx, params.id))
    },
    async 'campaign.targets'({ caller, params, query }) {
      read(caller)
      const { waves } = await needCampaign(ctx, params.id)
      const { stage, behind } = query
      const wanted = stage !== undefined ? [stage] : behind === 'true' ? behindStages : undefined
      if (wanted === undefined) return await pageOf(ctx, 'target', { ...page(query), where: { campaign: params.id } }, targetView)
      // Of some stages: each place in id order, together in id order.
      const places = Array.from({ length: waves }, (_, wave) => wanted.map((one) => placeOf(params.id, wave, one))).flat()
      const found = await Promise.all(places.map(async (place) => await ctx.store.find('target', { ...page(query), limit: query.limit + 1, where: { place } })))
      const rows = found.flat().toSorted((one, other) => (one.id < other.id ? -1 : 1))
      const shown = rows.slice(0, query.limit)
      return { items: shown.map(targetView), next: rows.length > query.limit ? (shown.at(-1)?.id ?? null) : null }
    },
    'campaign.pause': async ({ caller, params }) => await campaignView(ctx, await controlCampaign(ctx, caller, params.id, { order: 'pause' })),
    'campaign.resume': async ({ caller, params, body }) => await campaignView(ctx, await controlCampaign(ctx, caller, params.id, { order: 'resume', ...body })),
    'campaign.abort': async ({ caller, params }) => await campaignView(ctx, await controlCampaign(ctx, caller, params.id, { order: 'abort' })),
    'campaign.approve': async ({ caller, params }) => await campaignView(ctx, await approveCampaign(ctx, caller, params.id)),
    'campaign.advance': async ({ caller, params }) => await campaignView(ctx, await advanceCampaign(ctx, caller, params.id)),
    'campaign.confirm': async ({ caller, params, body }) => await campaignView(ctx, await confirmCut(ctx, caller, params.id, body.devices)),
    'campaign.retry': async ({ caller, params }) => await campaignView(ctx, await retryCampaign(ctx, caller, params.id)),
    'campaign.rollback': async ({ caller, params }) => await campaignView(ctx, await rollBack(ctx, caller, params.id)),

    async 'audit.list'({ caller, query }) {
      authorise(caller, 'audit.read')
      const { device } = query
      const items: SequencedEntry[] = []
      let after = query.after
      for (;;) {
        const found = await ctx.store.audit({ after, limit: 1000 })
        for (const entry of found) {
          if (items.length === query.limit) return { items: items.map(auditView), next: String(items.at(-1)?.sequence ?? after) }
          if (device === undefined || entry.subject === device || entry.caller === `device:${device}`) items.push(entry)
        }
        if (found.length < 1000) return { items: items.map(auditView), next: null }
        after = found.at(-1)?.sequence ?? after
      }
    },
    async 'audit.key'({ caller }) {
      authorise(caller, 'audit.read')
      return { origin: facts.log.origin, spki: Buffer.from(facts.log.spki).toString('base64') }
    },
  }
}

/** The signed checkpoint of the log as it stands: C2SP tlog-checkpoint, signed in the KMS. */
export const currentCheckpoint = async (ctx: Context, log: ServerFacts['log']): Promise<{ note: string; size: number }> => {
  const { size, root } = await ctx.store.checkpoint()
  const head = { origin: log.origin, size, root }
  const [signature] = await ctx.kms.sign([{ key: log.key, purpose: 'audit-signing', data: new TextEncoder().encode(checkpointText(head)) }])
  if (signature === undefined) throw new Problem('internal', 'the KMS gave no signature')
  return { note: signedCheckpoint(head, { spki: log.spki, signature }), size }
}

/** The whole log up to one checkpoint, as JSON lines; a slow reader slows this down, nothing piles up. */
export const adminStreams = (ctx: Context, facts: ServerFacts): Streams => ({
  async auditExport(caller, response) {
    authorise(caller, 'audit.read')
    const { note, size } = await currentCheckpoint(ctx, facts.log)
    response.writeHead(200, { 'content-type': 'application/jsonl', 'cache-control': 'no-store' })
    const write = async (text: string): Promise<void> => {
      if (!response.write(text)) await once(response, 'drain')
    }
    await write(exportHeader)
    for (let after = 0; after < size;) {
      const entries = (await ctx.store.audit({ after, limit: 1000 })).filter(({ sequence }) => sequence <= size)
      const last = entries.at(-1)
      if (last === undefined) throw new Problem('internal', `the log ends at ${after}, the checkpoint says ${size}`)
      await write(entries.map(exportLine).join(''))
      after = last.sequence
    }
    response.end(exportFooter(note))
  },
})
